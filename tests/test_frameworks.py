"""Other packages give with our LSTM what they give with torch.nn.LSTM. Trainers and tools (the extra `frameworks`);
models before and after convert and to_torch (the extra `interop`)."""
# ruff: noqa: RUF001  (phonemes look like other letters)

from pathlib import Path

import pytest
import torch
from comparing import DEVICE, KERNELS_HERE
from torch import Tensor, nn

import gpu_lstm
from gpu_lstm.tools.convert import to_torch

N, T, I, H = 12, 4, 3, 5
THEIRS = "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
pytestmark = [pytest.mark.deep, pytest.mark.usefixtures("exact_float32_products"), pytest.mark.filterwarnings(*THEIRS)]


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, T, I, generator=torch.Generator().manual_seed(0))
    return x, (x.sum((1, 2)) > 0).long()


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def hugging_face(kind, backend, folder, half=False) -> list[Tensor]:
    """Trainer.train, in float32 and with autocast; save_pretrained and back; a checkpoint resumed."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config, kind, backend) -> None:
            super().__init__(config)
            torch.manual_seed(0)
            ours = {} if backend is None else {"backend": backend}
            self.lstm, self.head = kind(I, H, batch_first=True, **ours), nn.Linear(H, 2)
            self.post_init()

        def _init_weights(self, module) -> None:
            pass  # they have been drawn

        def forward(self, x, labels=None):
            return {"loss": nn.functional.cross_entropy(self.head(self.lstm(x)[0][:, -1]), labels)}

    found, out = [], folder / f"{kind.__module__} {backend} {half}"
    for resume in (False, out / "checkpoint-3"):
        model = Model(transformers.PretrainedConfig(), kind, backend)
        arguments = transformers.TrainingArguments(
            out, num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True, bf16=half, report_to=[],
            save_strategy="epoch", logging_strategy="no", disable_tqdm=True)  # fmt: skip
        examples = [{"x": x, "labels": y} for x, y in zip(*data())]
        transformers.Trainer(model, arguments, train_dataset=examples).train(resume_from_checkpoint=resume)
        model.save_pretrained(out / "model")
        loaded = Model.from_pretrained(out / "model", kind=kind, backend=backend)
        assert all(map(torch.equal, weights(loaded), weights(model)))
        found.append(weights(model))
    assert all(map(torch.equal, *found)), "resumed it differs"
    return found[0]


def test_what_torch_nn_lstm_gives(tmp_path):
    """The same by torch's own LSTM, also with autocast; close by the kernels."""
    expected = hugging_face(nn.LSTM, None, tmp_path)
    assert all(tensor.any() for tensor in expected)
    for backend, tolerance in ((None, 0.0), (KERNELS_HERE, 1e-4)):
        found = hugging_face(gpu_lstm.LSTM, backend, tmp_path)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert all(map(torch.equal, *(hugging_face(kind, None, tmp_path, half=True) for kind in (gpu_lstm.LSTM, nn.LSTM))))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_acts_and_resets_to_the_states_that_are_stored(kind):
    """As its own module where a trajectory starts; gradients flow into the states there. `convert` does for it."""
    modules, TensorDict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict").TensorDict
    torch.manual_seed(0)
    x, starts, letters = data()[0], torch.rand(N, T, 1) < 0.4, "hc" if kind == "LSTM" else "h"
    states = {letter: torch.randn(N, T, 2, H, requires_grad=True) for letter in letters}
    keys = dict(in_keys=["x", *letters], out_keys=["y", *(("next", letter) for letter in letters)])
    module, name = getattr(modules, f"{kind}Module"), kind.lower()
    policy = module(**{name: getattr(nn, kind)(I, H, 2, batch_first=True)}, recurrent_backend="pad", **keys)

    def found(policy):
        whole = TensorDict({"x": x, "is_init": starts, **states}, [N, T])
        with modules.set_recurrent_mode(False):
            step = policy(whole[:, 0].clone())
        with modules.set_recurrent_mode(True):
            whole = policy(whole)
        gradients = torch.autograd.grad(whole["y"].square().sum(), [*states.values(), *policy.parameters()])
        return [step["y"], step["next", letters[-1]], whole["y"], whole["next", "h"], *gradients]

    expected = found(policy)
    assert all(tensor.any() for tensor in expected)
    gpu_lstm.convert(policy)
    assert type(getattr(policy, name)) is getattr(gpu_lstm.compat, kind)
    torch.testing.assert_close(gpu_lstm.backend("torch")(found)(policy), expected, rtol=0, atol=0)
    scan = module(**{name: getattr(policy, name)}, recurrent_backend="scan", **keys)
    for backend, each in (("auto", policy), (KERNELS_HERE, policy), ("auto", scan)):
        torch.testing.assert_close(gpu_lstm.backend(backend)(found)(each), expected, rtol=1e-4, atol=1e-5)


def test_a_checkout_is_not_mistaken_for_the_package_kernels(monkeypatch):
    """transformers looks for a distribution of that name, and finds the folder if the root is on the path."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import kernels

    assert not hasattr(kernels, "__version__")
    with pytest.raises(ModuleNotFoundError):
        import kernels.triton_rnn


def test_a_model_there_and_back():
    """stanza's tokenizer: bidirectional, over packed sequences, twice. Errors relative to each largest element."""
    from stanza.models.tokenization.model import Tokenizer

    torch.manual_seed(0)
    sizes = dict(feat_dim=2, rnn_layers=2, conv_res=None, hier_invtemp=0.5, tok_noise=0.0)
    settings = sizes | dict(hierarchical=True, use_mwt=True)
    model = Tokenizer(settings, nchars=20, emb_dim=4, hidden_dim=5, dropout=0.0, feat_dropout=0.0).to(DEVICE)
    units, features = torch.randint(1, 20, (3, 7), device=DEVICE), torch.rand(3, 7, 2, device=DEVICE)

    def results(backend):
        output = gpu_lstm.backend(backend)(model)(units, features, [7, 4, 2])
        return [output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))]

    before, kinds, keys = results("torch"), [type(module) for module in model.modules()], list(model.state_dict())
    assert all(tensor.any() for tensor in before)
    ours = [gpu_lstm.LSTM if kind is nn.LSTM else kind for kind in kinds]
    assert ours != kinds
    for swap, expected, backends in (
        (gpu_lstm.convert, ours, dict(torch=1e-6, reference=1e-5, triton=1e-5)), (to_torch, kinds, dict(torch=0)),
    ):  # fmt: skip
        assert swap(model) is model
        assert [type(module) for module in model.modules()] == expected
        assert list(model.state_dict()) == keys
        for backend, tolerance in backends.items():
            for found, true in zip(results(backend), before, strict=True):
                assert (found - true).abs().max() <= tolerance * true.abs().max()


def test_a_pretrained_model_says_the_same():
    """g2p-fa: Persian words into phonemes; an encoder, and a decoder that is called step by step."""
    from g2p_fa import G2P_Fa

    speaker, said = G2P_Fa(), {"سلام": "sælɒːm", "کتاب": "kʰætʰɒːb", "ایران": "ʔiːɾɒːn"}
    for swap in (nn.Module.eval, gpu_lstm.convert, to_torch):
        swap(speaker.model)
        assert {word: speaker(word) for word in said} == said
