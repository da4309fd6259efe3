"""convert and to_torch on models of other packages (the extra `interop`), against the model before conversion."""
# ruff: noqa: RUF001  (phonemes look like other letters)

import copy
from collections.abc import Callable

import pytest
import torch
from comparing import DEVICE
from torch import Tensor, nn

import gpu_lstm
from gpu_lstm.tools.convert import to_torch

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


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("exact_float32_products"),
              pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")]  # fmt: skip


def results(model: nn.Module, call: Callable[[], Tensor], backend: str = "torch") -> dict[str, Tensor]:
    """The output, and the gradient of every parameter that is not frozen."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    output = gpu_lstm.backend(backend)(call)()
    gradients = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    return {"output": output.detach(), **dict(zip(parameters, gradients, strict=True))}


def assert_close(found: dict[str, Tensor], true: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest element of each."""
    assert found.keys() == true.keys()
    for name, tensor in true.items():
        assert tensor.any(), f"{name} is zero, and tells nothing"
        error = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("build", [tokenizer, graph, policy])
def test_there_and_back(build):
    torch.manual_seed(0)
    model, call = build()
    for module in model.modules():  # without dropout
        if isinstance(module, nn.Dropout | nn.LSTM):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    before, kinds, keys = results(model, call), [type(module) for module in model.modules()], list(model.state_dict())
    ours = [gpu_lstm.LSTM if kind is nn.LSTM else kind for kind in kinds]
    assert ours != kinds
    for swap, expected, backends in (
        (gpu_lstm.convert, ours, dict(torch=1e-6, reference=1e-5, triton=1e-5)), (to_torch, kinds, dict(torch=0)),
    ):  # fmt: skip
        assert swap(model) is model
        assert [type(module) for module in model.modules()] == expected
        assert list(model.state_dict()) == keys
        for backend, tolerance in backends.items():
            assert_close(results(model, call, backend), before, tolerance)


def test_pretrained_phonemes_stay_the_same():
    """g2p-fa: Persian words into phonemes; an encoder, and a decoder that is called step by step."""
    from g2p_fa import G2P_Fa

    speaker = G2P_Fa()
    speaker.model.eval()
    words = ["سلام", "کتاب", "ایران", "آب", "دانشگاه"]
    before = [speaker(word) for word in words]
    assert before[:3] == ["sælɒːm", "kʰætʰɒːb", "ʔiːɾɒːn"]
    for swap in (gpu_lstm.convert, to_torch):
        swap(speaker.model)
        assert [speaker(word) for word in words] == before


def test_pretrained_languages_stay_the_same():
    """LanguageIdentifier: the language of a sentence from its characters; bidirectional."""
    from LanguageIdentifier.LanguageIdentifier import lid

    model = copy.deepcopy(lid.model)
    sentences = {"de": "ich habe heute morgen lange geschlafen", "en": "where are the keys of the house",
                 "es": "donde estan las llaves de la casa", "fr": "je ne sais pas quelle heure il est"}  # fmt: skip
    before = {language: dict(model.rank(sentence)) for language, sentence in sentences.items()}
    for swap in (gpu_lstm.convert, to_torch):
        swap(model)
        assert [model.predict(sentence) for sentence in sentences.values()] == list(sentences)
        for language, sentence in sentences.items():
            assert dict(model.rank(sentence)) == pytest.approx(before[language], abs=1e-3)
