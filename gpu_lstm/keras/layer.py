"""Keras's LSTM and GRU layers on the kernels of gpu_lstm. Importing this imports Keras. Written for Keras 3.15."""

import inspect
from typing import Any

import keras
import torch

from ..functional import gru_layer, lstm_layer
from .convert import OF_GRU, OF_LSTM, check_equations


class _OnOurKernels:
    """The common base of the two layers. Their other base is Keras's layer."""

    def __init__(self: Any, units: int, *args: Any, **kwargs: Any) -> None:
        if keras.backend.backend() != "torch":
            cure = "set KERAS_BACKEND=torch in the environment before keras is imported"
            needs = f"gpu_lstm.keras.{self._pair.name} needs Keras on torch"
            raise ValueError(f"{needs}, not on {keras.backend.backend()}: {cure}")
        super().__init__(units, *args, **kwargs)  # type: ignore[call-arg]  # Keras's
        check_equations(keras, self.cell)

    @property
    def use_cudnn(self) -> Any:
        """The value that was set. Keras's Bidirectional gets False when it asks whether it may call cuDNN.

        Otherwise it would call cuDNN for both directions, and not these layers.
        """
        caller: Any = inspect.currentframe().f_back  # type: ignore[union-attr]
        asks = caller.f_code.co_name in ("_can_attempt_fused_lstm", "_can_attempt_fused_gru")
        return False if asks else self._use_cudnn

    @use_cudnn.setter
    def use_cudnn(self, value: Any) -> None:
        self._use_cudnn = value

    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> tuple:
        """Run sequences [B, T, I]; return the last output [B, H], all outputs [B, T, H] and the states.

        This overrides the method of Keras that loops over the steps.
        """
        cell, to_tensor = self.cell, keras.ops.convert_to_tensor
        mask = keras.tree.flatten(mask)[0]
        if training and cell.implementation == 1 and (cell.dropout or cell.recurrent_dropout):
            return keras.layers.RNN.inner_loop(self, sequences, initial_state, mask, training=training)

        weights = self._pair.torchs_weights(cell, to_tensor)
        x = to_tensor(sequences).to(weights[0].dtype).transpose(0, 1)
        if training and cell.dropout:
            x = x * cell.get_dropout_mask(sequences[:, 0, :])  # one mask for all steps
        hx = [to_tensor(state).to(x.dtype) for state in initial_state]
        if self.stateful:
            hx = [state.clone() for state in hx]  # backward reads them, after Keras has overwritten its own
        if self.go_backwards:
            x = x.flip(0)
        lengths = None
        if mask is not None:
            mask = to_tensor(mask, dtype="bool").reshape(x.shape[1], x.shape[0]).T
            if self.go_backwards:
                mask = mask.flip(0)
            # The valid steps of a sequence are moved in front of its masked steps. So a mask of any form becomes
            # lengths.
            x = x.take_along_dim((~mask).byte().argsort(dim=0, stable=True)[:, :, None], 0)
            lengths = mask.sum(0)
        one_state = self._pair.module._cell.one_state
        run: Any = gru_layer if one_state else lstm_layer
        y, found = run(x, weights, hx[0] if one_state else hx, lengths=lengths)  # y [T, B, H]
        states = [found] if one_state else list(found)
        if mask is None:
            return states[0], y.transpose(0, 1), states
        number = mask.cumsum(0)  # how many steps up to this one, inclusive, are valid
        shown = (mask if self.zero_output_for_mask else number > 0)[:, :, None]
        if self.return_sequences:
            y = torch.where(shown, y.take_along_dim((number - 1).clamp(min=0)[:, :, None], 0), 0)
        return torch.where(shown[-1], states[0], 0), y.transpose(0, 1), states


@keras.saving.register_keras_serializable("gpu_lstm")
class LSTM(_OnOurKernels, keras.layers.LSTM):
    """keras.layers.LSTM on Keras's torch backend, computed by gpu_lstm: the same arguments, weights and numbers.

    Everything except the computation is Keras's own. Weights of either layer load into the other. docs/keras.md shows
    how to replace the layers of an existing model.

    - A mask may have any form. A masked step leaves the state unchanged. Its output repeats the output of the last
      valid step, or is zero with zero_output_for_mask. Values at masked steps, even NaN, affect neither results nor
      gradients.
    - dropout draws the same numbers as Keras from the same seed.
    - recurrent_dropout, and dropout with implementation=1, need a mask for each gate, which the kernels do not have.
      With them, calls with training=True run Keras's own loop over the steps, at its speed.
      `gpu_lstm.LSTM(recurrent_dropout=...)` has one mask for all gates and no loop.
    - unroll and use_cudnn are accepted and ignored. `gpu_lstm.backend` and GPU_LSTM_BACKEND choose the backend.

    Args:
        units, args, kwargs: The arguments of keras.layers.LSTM.

    Raises:
        ValueError: activation is not tanh, recurrent_activation is not sigmoid, or Keras does not run on torch. The
            errors of keras.layers.LSTM are raised, too.
    """

    _pair = OF_LSTM


@keras.saving.register_keras_serializable("gpu_lstm")
class GRU(_OnOurKernels, keras.layers.GRU):
    """keras.layers.GRU on Keras's torch backend, computed by gpu_lstm: the same arguments, weights and numbers.

    Masks, dropout, unroll and use_cudnn work as in LSTM.

    Args:
        units, args, kwargs: The arguments of keras.layers.GRU.

    Raises:
        ValueError: reset_after=False, since then the reset gate multiplies h before the product. The errors of LSTM are
            raised, too.
    """

    _pair = OF_GRU
