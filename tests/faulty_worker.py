"""What other processes run in the tests of the benchmark: functions that misbehave, and a benchmark that is quick."""

import os
import time


def hang_or_die(what, tell):
    tell(what)
    if what == "dies":
        os._exit(7)
    time.sleep(60)


def run_case(case, names, device, failed, tell):
    """bench.measure.run_case, where the time that is measured is not the point; the kernels are of the same tree."""
    import gpu_lstm.kernels
    from bench import measure, timing

    tree, of_kernels = (os.path.dirname(os.path.realpath(m.__path__[0])) for m in (gpu_lstm, gpu_lstm.kernels))
    assert tree == of_kernels
    timing.COPY_BYTES["cpu"], timing.PRODUCT_SIZE["cpu"], timing.CEILING_SECONDS = 1 << 20, 64, 0.01
    timing.SHORTEST, measure.SECONDS = 1e-5, 0.01
    return measure.run_case(case, names, device, failed, tell=tell)


def raise_(inputs):
    raise MemoryError("too large")
