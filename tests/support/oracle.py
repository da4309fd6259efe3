"""An LSTM, a GRU and an sLSTM layer in NumPy, float64, written from the formulas: one sequence and one step at a time.

It is independent of everything that it judges: it uses no torch and no shared index arithmetic, and gradients are
derived by hand.
"""

from types import SimpleNamespace

import numpy as np

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "peephole", "gain_ih", "gain_hh", "gain_c",
         "bias_c")  # fmt: skip


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def norm(v, gain, bias=0.0):
    """Normalise a vector. Return the result, the vector with mean 0 and variance about 1, and the deviation that it
    had."""
    deviation = np.sqrt(np.mean((v - v.mean()) ** 2) + 1e-5)
    unit = (v - v.mean()) / deviation
    return gain * unit + bias, unit, deviation


def norm_gradient(d, gain, unit, deviation):
    """Return the gradient of v from the gradient of norm's result."""
    d = d * gain
    return (d - d.mean() - unit * (d * unit).mean()) / deviation


def lstm(of_x, of_h, _, c_prev, w):
    """Compute one step. Return h, c, and the numbers for its gradient: i, f, g, o and c first."""
    zi, zf, zg, zo = np.split(of_x + of_h, 4)
    w_ic, w_fc, w_oc = (0.0, 0.0, 0.0) if w.peephole is None else np.split(w.peephole, 3)
    i, f, g = sigmoid(zi + w_ic * c_prev), sigmoid(zf + w_fc * c_prev), np.tanh(zg)
    c, unit = f * c_prev + i * g, ()
    o, seen = sigmoid(zo + w_oc * c), c
    if w.gain_c is not None:
        seen, *unit = norm(c, w.gain_c, 0.0 if w.bias_c is None else w.bias_c)
    m = o * np.tanh(seen)
    return m if w.weight_hr is None else w.weight_hr @ m, c, (i, f, g, o, c, seen, m, unit)


def lstm_gradient(grad_h, into_c, _, c_prev, saved, w, d):
    """Return the gradients of W_ih x, W_hh h, and of h and c before the step, from those of h and c after it. Gradients
    of weights are added to d."""
    i, f, g, o, c, seen, m, unit = saved
    grad_m = grad_h
    if w.weight_hr is not None:
        d.weight_hr += np.outer(grad_h, m)
        grad_m = w.weight_hr.T @ grad_h
    tanh_c = np.tanh(seen)
    grad_seen = grad_m * o * (1 - tanh_c**2)
    if w.gain_c is not None:
        d.gain_c += grad_seen * unit[0]
        if w.bias_c is not None:
            d.bias_c += grad_seen
        grad_seen = norm_gradient(grad_seen, w.gain_c, *unit)
    w_ic, w_fc, w_oc = (0.0, 0.0, 0.0) if w.peephole is None else np.split(w.peephole, 3)
    dz_o = grad_m * tanh_c * o * (1 - o)
    grad_c = into_c + grad_seen + w_oc * dz_o
    dz_i, dz_f, dz_g = grad_c * g * i * (1 - i), grad_c * c_prev * f * (1 - f), grad_c * i * (1 - g**2)
    if w.peephole is not None:
        d.peephole += np.concatenate([dz_i * c_prev, dz_f * c_prev, dz_o * c])
    dz = np.concatenate([dz_i, dz_f, dz_g, dz_o])
    return dz, dz, 0.0, grad_c * f + w_ic * dz_i + w_fc * dz_f


def gru(of_x, of_h, h_prev, c_prev, w):
    """Compute one step of a GRU, as `lstm` does of an LSTM. Its only state is h."""
    (x_r, x_z, x_n), (h_r, h_z, s) = np.split(of_x, 3), np.split(of_h, 3)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * s)
    return (1 - z) * n + z * h_prev, c_prev, (r, z, n, s)


def gru_gradient(grad_h, into_c, h_prev, _, saved, w, d):
    r, z, n, s = saved
    dz_n = grad_h * (1 - z) * (1 - n**2)
    dz_r, dz_z = dz_n * s * r * (1 - r), grad_h * (h_prev - n) * z * (1 - z)
    return np.concatenate([dz_r, dz_z, dz_n]), np.concatenate([dz_r, dz_z, dz_n * r]), grad_h * z, into_c


def slstm(of_x, of_h, _, before, w):
    """Compute one step of an sLSTM (Beck et al., 2024), as `lstm` does of an LSTM.

    Its state c holds c, n and m. c and n are those of the paper times e^-m: c' = f c + i g and n' = f n + i, with i =
    exp(z_i).
    """
    z_i, z_f, z_g, z_o = np.split(of_x + of_h, 4)
    log_f, g, o = -np.logaddexp(0.0, -z_f), np.tanh(z_g), sigmoid(z_o)
    c_prev, n_prev, m_prev = before
    kept = log_f + m_prev
    m = np.maximum(kept, z_i)
    i, f = np.exp(z_i - m), np.exp(kept - m)
    c, n = f * c_prev + i * g, f * n_prev + i
    return o * c / n, np.stack([c, n, m]).view(type(c)), (i, f, sigmoid(-z_f), g, o, c, n)


def slstm_gradient(grad_h, into_c, _, before, saved, w, d):
    """Return the gradients of a step. Its m scales c and n and has no gradient, since no result depends on it."""
    (i, f, not_f, g, o, c, n), (c_prev, n_prev, _) = saved, before
    grad_c, grad_n = into_c[0] + grad_h * o / n, into_c[1] - grad_h * o * c / n**2
    dz_i, of_kept = (grad_c * g + grad_n) * i, (grad_c * c_prev + grad_n * n_prev) * f
    dz = np.concatenate([dz_i, of_kept * not_f, grad_c * i * (1 - g**2), grad_h * c / n * o * (1 - o)])
    return dz, dz, 0.0, np.stack([grad_c * f, grad_n * f, of_kept])


def cell_of(h0, c0, w):
    """Return the functions of a cell with these sizes: a step, its gradient, and c of an empty state. An sLSTM has c, n
    and m in c0."""
    if c0.ndim == 3:
        return slstm, slstm_gradient, np.array([0.0, 0.0, -np.inf])[:, None]
    is_gru = w.weight_hr is None and len(w.weight_hh) == 3 * h0.shape[1]
    return (gru, gru_gradient, 0.0) if is_gru else (lstm, lstm_gradient, 0.0)


def named(weights):
    return SimpleNamespace(**dict.fromkeys(NAMES) | dict(zip(NAMES, weights)))


def layer(x, h0, c0, *weights, lengths=None, resets=None, reverse=False, dropout_h=None, zoneout_h=None, zoneout_c=None,
          reset_h=None, reset_c=None):  # fmt: skip
    """Compute one layer in one direction. Return (h [T, B, P], h_n [B, P], c_n [B, H], tape for `layer_gradients`).

    Weights are in the order of NAMES. peephole [3H] has the weights of each unit's cell state: before the step for the
    gates i and f, after it for o. gain_ih and gain_hh [4H], gain_c and bias_c [H] belong to the layer norms of
    weight_ih @ x, of weight_hh @ h, and of c in tanh(c).

    dropout_h [B, P] multiplies h in the recurrent product. zoneout_h [T, B, P] and zoneout_c [T, B, H] are the shares
    of the states that stay as they were before the step. reset_h [T, B, P] and reset_c [T, B, H] are the states after
    resets.

    A GRU uses no c. c0 and c_n of an sLSTM are c, n and m, [3, B, H]. A state is empty where n = 0. Equal states may
    have different c, n and m. So c_n has c / n, 1 and m + log(n), or zeros where the state is empty.
    """
    w, (T, B, _) = named(weights), x.shape
    step, _, empty = cell_of(h0, c0, w)
    out, tape, h_n, c_n = np.zeros((T, *h0.shape)), [], h0.copy(), c0.copy()
    for b in range(B):
        length, h, c = T if lengths is None else int(lengths[b]), h0[b], c0[..., b, :]
        if step is slstm:
            c = np.where(c[1] == 0, empty, c)
        for k, t in enumerate(reversed(range(length)) if reverse else range(length)):
            # A reset at r separates time r from time r - 1.
            boundary = t + 1 if reverse else t
            reset = resets is not None and (k > 0 or not reverse) and bool(resets[boundary, b])
            h_prev, c_prev = h, c
            if reset:
                h_prev = np.zeros_like(h) if reset_h is None else reset_h[boundary, b]
                c_prev = np.broadcast_to(empty, c.shape) if reset_c is None else reset_c[boundary, b]
            h_in = h_prev if dropout_h is None else h_prev * dropout_h[b]
            of_x, of_h, units = w.weight_ih @ x[t, b], w.weight_hh @ h_in, {}
            if w.gain_ih is not None:
                of_x, *units["ih"] = norm(of_x, w.gain_ih)
            if w.gain_hh is not None:
                of_h, *units["hh"] = norm(of_h, w.gain_hh)
            if w.bias_ih is not None:
                of_x, of_h = of_x + w.bias_ih, of_h + w.bias_hh
            h, c, saved = step(of_x, of_h, h_prev, c_prev, w)
            if zoneout_h is not None:
                h = zoneout_h[t, b] * h_prev + (1 - zoneout_h[t, b]) * h
            if zoneout_c is not None:
                c = zoneout_c[t, b] * c_prev + (1 - zoneout_c[t, b]) * c
            out[t, b] = h
            tape.append((b, t, boundary if reset else None, units, (h_prev, h_in, c_prev), *saved))
        h_n[b], c_n[..., b, :] = h, c
    if step is slstm:
        c, n, m = c_n
        some = np.where(n == 0, 1.0, n)
        c_n = np.where(n == 0, 0.0, [c / some, np.ones_like(n), m + np.log(some)]).view(type(n))
    return out, h_n, c_n, tape


def layer_gradients(x, h0, c0, *weights, tape, dh, dh_n, dc_n, dropout_h=None, zoneout_h=None, zoneout_c=None,
                    reset_h=None, reset_c=None):  # fmt: skip
    """Return the gradients, through time, of x, h0, c0, the weights, reset_h and reset_c. A gradient is None where
    there is no such tensor."""
    w = named(weights)
    _, gradient, _ = cell_of(h0, c0, w)
    d = SimpleNamespace(**{name: None if a is None else np.zeros(a.shape) for name, a in vars(w).items()})
    dx, dreset_h, dreset_c = (None if a is None else np.zeros(a.shape) for a in (x, reset_h, reset_c))
    into_h, into_c = dh_n.copy(), dc_n.copy()  # [B, *] gradients of each sequence's states after the current step
    if gradient is slstm_gradient:
        c, n, _ = c0.copy()
        for b, *_, of_step, its_sum in tape:
            c[b], n[b] = of_step, its_sum
        dq, _, dl = np.where(n == 0, 0.0, dc_n)
        n = np.where(n == 0, 1.0, n)
        into_c = np.stack([dq / n, dl / n - dq * c / n**2, dl])
    for b, t, reset, units, (h_prev, h_in, c_prev), *saved in reversed(tape):
        stays_h, stays_c = (0.0 if stays is None else stays[t, b] for stays in (zoneout_h, zoneout_c))
        grad_h, grad_c = dh[t, b] + into_h[b], into_c[..., b, :]
        states = (1 - stays_h) * grad_h, (1 - stays_c) * grad_c, h_prev, c_prev
        dz_x, dz_h, past_h, past_c = gradient(*states, saved, w, d)
        if w.bias_ih is not None:
            d.bias_ih += dz_x
            d.bias_hh += dz_h
        if w.gain_ih is not None:
            d.gain_ih += dz_x * units["ih"][0]
            dz_x = norm_gradient(dz_x, w.gain_ih, *units["ih"])
        if w.gain_hh is not None:
            d.gain_hh += dz_h * units["hh"][0]
            dz_h = norm_gradient(dz_h, w.gain_hh, *units["hh"])
        dx[t, b] = w.weight_ih.T @ dz_x
        d.weight_ih += np.outer(dz_x, x[t, b])
        d.weight_hh += np.outer(dz_h, h_in)
        factors = 1.0 if dropout_h is None else dropout_h[b]
        into_h[b] = factors * (w.weight_hh.T @ dz_h) + past_h + stays_h * grad_h
        into_c[..., b, :] = past_c + stays_c * grad_c
        if reset is not None:
            if reset_h is not None:
                dreset_h[reset, b], dreset_c[reset, b] = into_h[b], into_c[b]
            into_h[b], into_c[..., b, :] = 0, 0
    # Where a sequence has no step, its final state is the initial one.
    return dx, into_h, into_c, *vars(d).values(), dreset_h, dreset_c


def stack(x, states, layers, *, lengths=None, resets=None, noises=None, kept=(), residual=False, reverse=False):
    """Compute layers on top of each other. Return (y [T, B, D*P], final states [L][D], tapes [L] for
    `stack_gradients`).

    `states` (h0, c0), the weights in `layers`, and `noises` are lists [L][D], for every layer and direction. `noises`
    holds the masks and the states after resets, by argument of `layer`. `kept` has factors of the outputs of the first
    layers, [T, B, D*P], as dropout between layers has. With `reverse` the first direction is reverse,
    too.
    """
    valid = np.arange(len(x))[:, None] < (len(x) if lengths is None else np.asarray(lengths))  # [T, B] or [T, 1]
    finals, tapes = [], []
    for k, directions in enumerate(layers):
        outputs, final, taken = [], [], []
        for d, weights in enumerate(directions):
            noise, inputs = {} if noises is None else noises[k][d], (x, *states[k][d], *weights)
            h, h_n, c_n, tape = layer(*inputs, lengths=lengths, resets=resets, reverse=reverse or d == 1, **noise)
            outputs.append(h)
            final.append((h_n, c_n))
            taken.append((inputs, noise, tape))
        y = np.concatenate(outputs, axis=2)
        passed = valid[:, :, None] * (residual and x.shape == y.shape)  # the share of x that is added to y
        x = passed * x + y if passed.any() else y
        x = x * kept[k] if k < len(kept) else x
        finals.append(final)
        tapes.append((passed, kept[k : k + 1], taken))
    return x, finals, tapes


def stack_gradients(tapes, dy, dfinals):
    """Return the gradients of x, of the states [L][D], of the weights [L][D], and of the states after resets [L][D]."""
    dstates, dweights, dleft = [], [], []
    for (passed, kept, taken), dfinal in zip(reversed(tapes), reversed(dfinals)):
        dy = dy * kept[0] if len(kept) else dy
        found = [
            layer_gradients(*inputs, tape=tape, dh=dh, dh_n=dh_n, dc_n=dc_n, **noise)
            for (inputs, noise, tape), dh, (dh_n, dc_n) in zip(taken, np.split(dy, len(taken), axis=2), dfinal)
        ]
        dx = sum(dx for dx, *_ in found)
        dy = dx + passed * dy if passed.any() else dx
        dstates.insert(0, [(dh0, dc0) for _, dh0, dc0, *_ in found])
        dweights.insert(0, [weights for _, _, _, *weights, _, _ in found])
        dleft.insert(0, [(dreset_h, dreset_c) for *_, dreset_h, dreset_c in found])
    return dy, dstates, dweights, dleft
