"""python -m bench: run the benchmarks."""

from .drop_in import main

if __name__ == "__main__":
    main()
