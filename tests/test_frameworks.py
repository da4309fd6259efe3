"""Other packages give with our LSTM what they give with torch.nn.LSTM.

Trainers and tools (the extra `frameworks`); models before and after convert and to_torch (the extra `interop`).
"""
# ruff: noqa: RUF001  (phonemes look like other letters)

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gpu_lstm
from gpu_lstm.tools.convert import to_torch

N, T, I, H = 12, 4, 3, 5
Found = list[Tensor]
THEIRS = "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
pytestmark = [pytest.mark.deep, pytest.mark.usefixtures("exact_float32_products"), pytest.mark.filterwarnings(*THEIRS)]


class Classifier(nn.Module):
    """The last of an LSTM's outputs, and a head."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM, backend: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = lstm(kind, backend)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm(kind: type[nn.Module], backend: str | None, **arguments) -> nn.Module:
    return kind(I, H, batch_first=True, **arguments, **({} if backend is None else {"backend": backend}))


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, T, I, generator=torch.Generator().manual_seed(0))
    return x, (x.sum((1, 2)) > 0).long()


def weights(*modules: nn.Module) -> Found:
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def lightning(kind, backend, folder, half=False) -> Found:
    """Trainer.fit with clipped gradients, in float32 and with autocast; a checkpoint there and back."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, kind, backend) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = Classifier(kind, backend)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Module(kind, backend)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision="bf16-mixed" if half else "32-true", gradient_clip_val=0.1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=4))
    trainer.save_checkpoint(folder / "checkpoint")
    loaded = Module.load_from_checkpoint(folder / "checkpoint", weights_only=False)
    assert all(map(torch.equal, weights(loaded), weights(module)))
    return weights(module)


def hugging_face(kind, backend, folder, half=False) -> Found:
    """Trainer.train, in float32 and with autocast; save_pretrained and back; a checkpoint resumed."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config, kind, backend) -> None:
            super().__init__(config)
            self.net = Classifier(kind, backend)
            self.post_init()

        def _init_weights(self, module) -> None:
            pass  # they have been drawn

        def forward(self, x, labels=None):
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

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


def skorch(kind, backend, folder) -> Found:
    """A classifier for scikit-learn: fitted, pickled, and cloned by a grid search over its learning rate."""
    skorch = pytest.importorskip("skorch")
    from sklearn.model_selection import GridSearchCV

    x, y = (t.numpy() for t in data())
    classifier = skorch.NeuralNetClassifier(
        Classifier, module__kind=kind, module__backend=backend, criterion=nn.CrossEntropyLoss, max_epochs=2, lr=0.1,
        train_split=None, verbose=0)  # fmt: skip
    torch.manual_seed(0)
    classifier.fit(x, y)
    copy = pickle.loads(pickle.dumps(classifier))
    assert (copy.predict_proba(x) == classifier.predict_proba(x)).all()
    search = GridSearchCV(classifier, {"lr": [0.1, 0.2]}, cv=2, scoring="accuracy").fit(x, y)
    return weights(classifier.module_, search.best_estimator_.module_)


def safetensors(kind, backend, folder) -> Found:
    """A model's weights in a file, read by torch.nn.LSTM too."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, others = Classifier(kind, backend), [Classifier(kind, backend), Classifier()]
    safetensors.save_model(model, folder / "model.safetensors")
    for other in others:
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        safetensors.load_model(other, folder / "model.safetensors")
        assert all(map(torch.equal, weights(other), weights(model)))
    return weights(*others)


def captum(kind, backend, folder) -> Found:
    """Attributions to the input; activations and conductance of the head. It does not support layers with states."""
    attr = pytest.importorskip("captum.attr")
    model, x = Classifier(kind, backend).eval(), data()[0][:2]
    methods = attr.IntegratedGradients, attr.Saliency, attr.InputXGradient, attr.FeatureAblation
    np.random.seed(0)
    torch.manual_seed(0)
    shap = attr.GradientShap(model).attribute(x, baselines=torch.zeros_like(x), target=1)
    activation = attr.LayerActivation(model, model.head).attribute(x)
    conductance = attr.LayerConductance(model, model.head).attribute(x, target=1)
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'clone'"):
        attr.LayerActivation(model, model.lstm).attribute(x)
    found = [*(method(model).attribute(x, target=1) for method in methods), shap, activation, conductance]
    return [each.detach() for each in found]


KEYS = dict(in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")])  # of TorchRL's LSTMModule


def torchrl(kind, backend, folder, rate=0.0) -> Found:
    """LSTMModule, step by step and over trajectories, which it tells apart by is_init. It asks for nn.LSTM's class."""
    modules, TensorDict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict").TensorDict
    kind = gpu_lstm.compat.LSTM if kind is gpu_lstm.LSTM else kind
    torch.manual_seed(0)
    policy = modules.LSTMModule(lstm=lstm(kind, backend, num_layers=2), **KEYS)
    given = {"is_init": torch.rand(N, T, 1) < rate, **{name: torch.randn(N, T, 2, H) for name in "hc"}}
    whole = TensorDict({"x": data()[0], **given}, [N, T])
    with modules.set_recurrent_mode(False):
        step = policy(whole[:, 0].clone())
    with modules.set_recurrent_mode(True):
        whole = policy(whole)
    gradients = torch.autograd.grad(whole["y"].square().sum(), list(policy.parameters()))
    return [t.detach() for t in (step["y"], step["next", "c"], whole["y"], whole["next", "h"], *gradients)]


@pytest.mark.parametrize(("run", "options"), [
    (lightning, {}), (hugging_face, {}), (skorch, {}), (safetensors, {}), (captum, {}), (torchrl, {}),
    (torchrl, dict(rate=0.4))], ids=lambda run: getattr(run, "__name__", str(run)))  # fmt: skip
def test_what_torch_nn_lstm_gives(run, options, tmp_path):
    """The same by torch's own LSTM, also with autocast; close by the kernels."""
    expected = run(nn.LSTM, None, tmp_path, **options)
    assert all(tensor.any() for tensor in expected)
    for backend, tolerance in ((None, 0.0), ("triton", 1e-4)):
        found = run(gpu_lstm.LSTM, backend, tmp_path, **options)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if run in (lightning, hugging_face):
        assert all(map(torch.equal, *(run(kind, None, tmp_path, half=True) for kind in (gpu_lstm.LSTM, nn.LSTM))))


def test_torchrl_resets_to_the_states_that_are_stored():
    """As LSTMModule where a trajectory starts; gradients flow into the states there. `convert` does for it."""
    modules, TensorDict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict").TensorDict
    torch.manual_seed(0)
    x, starts = data()[0], torch.rand(N, T) < 0.4
    h, c = (torch.randn(N, T, 2, H, requires_grad=True) for _ in range(2))
    policy = modules.LSTMModule(lstm=lstm(nn.LSTM, None, num_layers=2), recurrent_backend="pad", **KEYS)

    def found(policy):
        with modules.set_recurrent_mode(True):
            y = policy(TensorDict({"x": x, "is_init": starts[:, :, None], "h": h, "c": c}, [N, T]))["y"]
        return [y, *torch.autograd.grad(y.square().sum(), [h, c, *policy.parameters()])]

    expected = found(policy)
    assert all(tensor.any() for tensor in expected)
    for backend in ("reference", "triton"):
        ours = lstm(gpu_lstm.LSTM, backend, num_layers=2)
        ours.load_state_dict(policy.lstm.state_dict())
        first, left = zip(*((t[:, 0].movedim(1, 0), t.movedim(2, 0)) for t in (h, c)))
        y, _ = ours(x, first, resets=starts, reset_states=left)
        gradients = torch.autograd.grad(y.square().sum(), [h, c, *ours.parameters()])
        torch.testing.assert_close([y, *gradients], expected, rtol=1e-5, atol=1e-6)
    gpu_lstm.convert(policy)
    assert type(policy.lstm) is gpu_lstm.compat.LSTM
    torch.testing.assert_close(found(policy), expected, rtol=0, atol=0)
    scan = modules.LSTMModule(lstm=policy.lstm, recurrent_backend="scan", **KEYS)
    torch.testing.assert_close(found(scan), expected, rtol=1e-5, atol=1e-6)


def test_opacus():
    """By way of to_torch: opacus replaces torch.nn.LSTM, and no other class, with its own LSTM."""
    pytest.importorskip("opacus")
    from opacus import PrivacyEngine
    from opacus.layers import DPLSTM
    from opacus.validators import ModuleValidator

    assert type(ModuleValidator.fix(Classifier(gpu_lstm.LSTM)).lstm) is gpu_lstm.LSTM
    found = []
    for model in map(ModuleValidator.fix, (Classifier(), to_torch(Classifier(gpu_lstm.LSTM)))):
        assert type(model.lstm) is DPLSTM
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(0)
        private, optimizer, batches = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=DataLoader(TensorDataset(*data()), batch_size=4),
            noise_multiplier=1.0, max_grad_norm=1.0, noise_generator=torch.Generator().manual_seed(0))  # fmt: skip
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
        found.append(weights(private))
    assert all(map(torch.equal, *found))


def test_a_checkout_is_not_mistaken_for_the_package_kernels(monkeypatch):
    """transformers looks for a distribution of that name, and finds the folder if the root is on the path."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import kernels

    assert not hasattr(kernels, "__version__")
    with pytest.raises(ModuleNotFoundError):
        import kernels.triton_lstm


# models of other packages

Built = tuple[nn.Module, Callable[[], Tensor]]  # a model, and a call of it that depends on all its LSTMs


def tokenizer() -> Built:
    """stanza's tokenizer: bidirectional, over packed sequences, twice."""
    from stanza.models.tokenization.model import Tokenizer

    sizes = dict(feat_dim=2, rnn_layers=2, conv_res=None, hier_invtemp=0.5, tok_noise=0.02)
    settings = sizes | dict(hierarchical=True, use_mwt=True)
    model = Tokenizer(settings, nchars=20, emb_dim=4, hidden_dim=5, dropout=0.33, feat_dropout=0.05).to(DEVICE)
    units, features = torch.randint(1, 20, (3, 7), device=DEVICE), torch.rand(3, 7, 2, device=DEVICE)
    return model, lambda: model(units, features, [7, 4, 2])


def graph() -> Built:
    """PyTorch Geometric's GraphSAGE: LSTMs over neighbours, and a bidirectional one over the layers."""
    from torch_geometric.nn import GraphSAGE

    model = GraphSAGE(3, 4, num_layers=2, aggr="lstm", jk="lstm").to(DEVICE)
    model.jk.att.bias.requires_grad_(False)  # a softmax cancels it; its gradient is nothing but rounding
    x = torch.randn(5, 3, device=DEVICE)
    edges = torch.tensor([[1, 2, 3, 0, 4, 2, 0], [0, 0, 0, 1, 2, 3, 4]], device=DEVICE)  # sorted by their target
    return model, lambda: model(x, edges)


def policy() -> Built:
    """sb3-contrib's recurrent policy: an LSTM for the actions and one for the value; episodes start midway."""
    from gymnasium.spaces import Box, Discrete
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    model = RecurrentActorCriticPolicy(Box(-1, 1, (3,)), Discrete(2), lambda progress: 1e-3, lstm_hidden_size=4)
    x, actions = torch.randn(2 * 6, 3, device=DEVICE), torch.randint(0, 2, (2 * 6,), device=DEVICE)
    starts = (torch.rand(2 * 6, device=DEVICE) < 0.3).to(x.dtype)
    states = RNNStates(*torch.randn(2, 2, 1, 2, 4, device=DEVICE).unbind())

    def call() -> Tensor:
        values, log_probabilities, _ = model.evaluate_actions(x, actions, states, starts)
        return torch.stack([values.flatten(), log_probabilities])

    return model.to(DEVICE), call


def results(model: nn.Module, call: Callable[[], Tensor], backend: str = "torch") -> Found:
    """The output, and the gradient of every parameter that is not frozen."""
    output = gpu_lstm.backend(backend)(call)()
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]


@pytest.mark.parametrize("build", [tokenizer, graph, policy])
def test_a_model_there_and_back(build):
    """Errors are relative to the largest element of each tensor."""
    torch.manual_seed(0)
    model, call = build()
    for module in model.modules():  # without dropout
        if isinstance(module, nn.Dropout | nn.LSTM):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    before, kinds, keys = results(model, call), [type(module) for module in model.modules()], list(model.state_dict())
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
            for found, true in zip(results(model, call, backend), before, strict=True):
                assert (found - true).abs().max() <= tolerance * true.abs().max()


def phonemes() -> tuple[nn.Module, Callable, dict]:
    """g2p-fa: Persian words into phonemes; an encoder, and a decoder that is called step by step."""
    from g2p_fa import G2P_Fa

    speaker = G2P_Fa()
    speaker.model.eval()
    return speaker.model, speaker, {"سلام": "sælɒːm", "کتاب": "kʰætʰɒːb", "ایران": "ʔiːɾɒːn"}


def languages() -> tuple[nn.Module, Callable, dict]:
    """LanguageIdentifier: the language of a sentence from its characters; bidirectional."""
    from LanguageIdentifier.LanguageIdentifier import lid

    model = copy.deepcopy(lid.model)
    return model, model.predict, {
        "ich habe heute morgen lange geschlafen": "de", "where are the keys of the house": "en",
        "donde estan las llaves de la casa": "es", "je ne sais pas quelle heure il est": "fr"}  # fmt: skip


@pytest.mark.parametrize("load", [phonemes, languages])
def test_pretrained_models_say_the_same(load):
    model, call, said = load()
    for swap in (lambda model: model, gpu_lstm.convert, to_torch):
        swap(model)
        assert {text: call(text) for text in said} == said
