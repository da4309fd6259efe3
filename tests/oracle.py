"""An LSTM, a GRU and an sLSTM layer in NumPy, float64, written from the formulas: one sequence and one step at a time.

Independent of everything it judges: no torch, no shared index arithmetic, gradients by hand.
"""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def norm(v, gain, bias=0.0):
    """Layer norm of a vector, (its result, the vector with mean 0 and variance about 1, the deviation it had)."""
    deviation = np.sqrt(np.mean((v - v.mean()) ** 2) + 1e-5)
    unit = (v - v.mean()) / deviation
    return gain * unit + bias, unit, deviation


def norm_gradient(d, gain, unit, deviation):
    """Gradient of norm's result -> of v."""
    d = d * gain
    return (d - d.mean() - unit * (d * unit).mean()) / deviation


def layer(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, weight_hr=None, peephole=None, gain_ih=None,
          gain_hh=None, gain_c=None, bias_c=None, *, lengths=None, resets=None, reverse=False, dropout_h=None,
          zoneout_h=None, zoneout_c=None, reset_h=None, reset_c=None):  # fmt: skip
    """One layer, one direction: (h [T, B, P], h_n [B, P], c_n [B, H], tape for `layer_gradients`).

    dropout_h [B, P] multiplies h in the recurrent product; zoneout_h [T, B, P] and zoneout_c [T, B, H] are the shares
    of the states that stay as they were before the step. reset_h [T, B, P] and reset_c [T, B, H] are what resets leave.
    peephole [3H]: a gate's own weight of each unit's cell state, before the step for i and f, after it for o.
    gain_ih and gain_hh [4H], gain_c and bias_c [H]: layer norm of weight_ih @ x, of weight_hh @ h, and of c in tanh(c).
    """
    T, B, _ = x.shape
    out, tape = np.zeros((T, *h0.shape)), []
    h_n, c_n = h0.copy(), c0.copy()
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        h, c = h0[b], c0[b]
        for step, t in enumerate(reversed(range(length)) if reverse else range(length)):
            # A reset at r separates time r from time r - 1.
            boundary = t + 1 if reverse else t
            reset = resets is not None and (step > 0 or not reverse) and bool(resets[boundary, b])
            h_prev, c_prev = h, c
            if reset:
                h_prev = np.zeros_like(h) if reset_h is None else reset_h[boundary, b]
                c_prev = np.zeros_like(c) if reset_c is None else reset_c[boundary, b]
            h_in = h_prev if dropout_h is None else h_prev * dropout_h[b]
            of_x, of_h, units = weight_ih @ x[t, b], weight_hh @ h_in, {}
            if gain_ih is not None:
                of_x, *units["ih"] = norm(of_x, gain_ih)
            if gain_hh is not None:
                of_h, *units["hh"] = norm(of_h, gain_hh)
            zi, zf, zg, zo = np.split(of_x + of_h + (0.0 if bias_ih is None else bias_ih + bias_hh), 4)
            w_ic, w_fc, w_oc = (0.0, 0.0, 0.0) if peephole is None else np.split(peephole, 3)
            i, f, g = sigmoid(zi + w_ic * c_prev), sigmoid(zf + w_fc * c_prev), np.tanh(zg)
            seen = c_new = c = f * c_prev + i * g
            o = sigmoid(zo + w_oc * c_new)
            if gain_c is not None:
                seen, *units["c"] = norm(c, gain_c, 0.0 if bias_c is None else bias_c)
            m = o * np.tanh(seen)
            h = m if weight_hr is None else weight_hr @ m
            stays_h, stays_c = (0.0 if stays is None else stays[t, b] for stays in (zoneout_h, zoneout_c))
            h, c = stays_h * h_prev + (1 - stays_h) * h, stays_c * c_prev + (1 - stays_c) * c
            out[t, b] = h
            tape.append((b, t, boundary if reset else None, h_in, c_prev, i, f, g, o, c_new, seen, m, units))
        h_n[b], c_n[b] = h, c
    return out, h_n, c_n, tape


def layer_gradients(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, weight_hr=None, peephole=None,
                    gain_ih=None, gain_hh=None, gain_c=None, bias_c=None, *, tape, dh, dh_n, dc_n, dropout_h=None,
                    zoneout_h=None, zoneout_c=None, reset_h=None, reset_c=None):  # fmt: skip
    """Gradients of x, h0, c0, the weights and what resets leave (None where there is none), through time."""
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, gain_ih, gain_hh, gain_c, bias_c)
    every = x, reset_h, reset_c, *weights
    dx, dreset_h, dreset_c, *dweights = (None if a is None else np.zeros(a.shape) for a in every)
    dw_ih, dw_hh, db_ih, db_hh, dw_hr, dpeephole, dgain_ih, dgain_hh, dgain_c, dbias_c = dweights
    into_h, into_c = dh_n.copy(), dc_n.copy()  # [B, *] gradient of each sequence's state after the step in hand
    for b, t, reset, h_in, c_prev, i, f, g, o, c_new, seen, m, units in reversed(tape):
        factors = 1.0 if dropout_h is None else dropout_h[b]
        stays_h, stays_c = (0.0 if stays is None else stays[t, b] for stays in (zoneout_h, zoneout_c))
        grad_h = dh[t, b] + into_h[b]
        grad_m = grad_h_new = (1 - stays_h) * grad_h
        if weight_hr is not None:
            dw_hr += np.outer(grad_h_new, m)
            grad_m = weight_hr.T @ grad_h_new
        tanh_c = np.tanh(seen)
        grad_seen = grad_m * o * (1 - tanh_c**2)
        if gain_c is not None:
            dgain_c += grad_seen * units["c"][0]
            if bias_c is not None:
                dbias_c += grad_seen
            grad_seen = norm_gradient(grad_seen, gain_c, *units["c"])
        w_ic, w_fc, w_oc = (0.0, 0.0, 0.0) if peephole is None else np.split(peephole, 3)
        grad_c = (1 - stays_c) * into_c[b] + grad_seen + w_oc * grad_m * tanh_c * o * (1 - o)
        dz_i, dz_f = grad_c * g * i * (1 - i), grad_c * c_prev * f * (1 - f)
        dz_g, dz_o = grad_c * i * (1 - g**2), grad_m * tanh_c * o * (1 - o)
        dz_x = dz_h = dz = np.concatenate([dz_i, dz_f, dz_g, dz_o])
        if gain_ih is not None:
            dgain_ih += dz * units["ih"][0]
            dz_x = norm_gradient(dz, gain_ih, *units["ih"])
        if gain_hh is not None:
            dgain_hh += dz * units["hh"][0]
            dz_h = norm_gradient(dz, gain_hh, *units["hh"])
        dx[t, b] = weight_ih.T @ dz_x
        dw_ih += np.outer(dz_x, x[t, b])
        dw_hh += np.outer(dz_h, h_in)
        if bias_ih is not None:
            db_ih += dz
            db_hh += dz
        into_h[b] = factors * (weight_hh.T @ dz_h) + stays_h * grad_h
        if peephole is not None:
            dpeephole += np.concatenate([dz_i * c_prev, dz_f * c_prev, dz_o * c_new])
        into_c[b] = grad_c * f + w_ic * dz_i + w_fc * dz_f + stays_c * into_c[b]
        if reset is not None:
            if reset_h is not None:
                dreset_h[reset, b], dreset_c[reset, b] = into_h[b], into_c[b]
            into_h[b], into_c[b] = 0, 0
    dh0, dc0 = into_h, into_c  # where there was no step at all, the final state is the initial one
    return dx, dh0, dc0, *dweights, dreset_h, dreset_c


def gru_layer(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *absent, lengths=None, resets=None,
              reverse=False, dropout_h=None, zoneout_h=None, zoneout_c=None, reset_h=None, reset_c=None):  # fmt: skip
    """As `layer`, of a GRU, whose only state is h: c0 and what is called c are not used, and c_n is zero."""
    T, B, _ = x.shape
    out, tape, h_n = np.zeros((T, *h0.shape)), [], h0.copy()
    for b in range(B):
        length, h = T if lengths is None else int(lengths[b]), h0[b]
        for step, t in enumerate(reversed(range(length)) if reverse else range(length)):
            boundary = t + 1 if reverse else t
            reset = resets is not None and (step > 0 or not reverse) and bool(resets[boundary, b])
            h_prev = h
            if reset:
                h_prev = np.zeros_like(h) if reset_h is None else reset_h[boundary, b]
            h_in = h_prev if dropout_h is None else h_prev * dropout_h[b]
            x_r, x_z, x_n = np.split(weight_ih @ x[t, b] + (0.0 if bias_ih is None else bias_ih), 3)
            h_r, h_z, s = np.split(weight_hh @ h_in + (0.0 if bias_hh is None else bias_hh), 3)
            r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
            n = np.tanh(x_n + r * s)
            stays = 0.0 if zoneout_h is None else zoneout_h[t, b]
            out[t, b] = h = stays * h_prev + (1 - stays) * ((1 - z) * n + z * h_prev)
            tape.append((b, t, boundary if reset else None, h_prev, h_in, r, z, n, s))
        h_n[b] = h
    return out, h_n, np.zeros_like(h_n), tape


def gru_layer_gradients(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *absent, tape, dh, dh_n, dc_n,
                        dropout_h=None, zoneout_h=None, zoneout_c=None, reset_h=None, reset_c=None):  # fmt: skip
    """As `layer_gradients`, of a GRU."""
    every = x, weight_ih, weight_hh, bias_ih, bias_hh, reset_h
    dx, dw_ih, dw_hh, db_ih, db_hh, dreset_h = (None if a is None else np.zeros(a.shape) for a in every)
    into_h = dh_n.copy()
    for b, t, reset, h_prev, h_in, r, z, n, s in reversed(tape):
        stays = 0.0 if zoneout_h is None else zoneout_h[t, b]
        grad_h = dh[t, b] + into_h[b]
        d = (1 - stays) * grad_h
        dz_n = d * (1 - z) * (1 - n**2)
        dz_r, dz_z = dz_n * s * r * (1 - r), d * (h_prev - n) * z * (1 - z)
        of_x, of_h = np.concatenate([dz_r, dz_z, dz_n]), np.concatenate([dz_r, dz_z, dz_n * r])
        dx[t, b] = weight_ih.T @ of_x
        dw_ih += np.outer(of_x, x[t, b])
        dw_hh += np.outer(of_h, h_in)
        if bias_ih is not None:
            db_ih += of_x
            db_hh += of_h
        into_h[b] = (1.0 if dropout_h is None else dropout_h[b]) * (weight_hh.T @ of_h) + d * z + stays * grad_h
        if reset is not None:
            if reset_h is not None:
                dreset_h[reset, b] = into_h[b]
            into_h[b] = 0
    return dx, into_h, np.zeros_like(into_h), dw_ih, dw_hh, db_ih, db_hh, *absent, dreset_h, None


def slstm_layer(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *absent, lengths=None, resets=None,
                reverse=False, dropout_h=None):  # fmt: skip
    """As `layer`, of an sLSTM (Beck et al., 2024), of which c0 and c_n are c, n and m, [3, B, H].

    c and n are those of c' = f c + i g and n' = f n + i, with i = exp(z_i), times e^-m. Where n = 0 the state is empty,
    and m is -inf. c_n has what equal states have in common: c / n, 1 and m + log(n), or zeros if it is empty.
    """
    T, B, _ = x.shape
    out, tape, h_n, last = np.zeros((T, *h0.shape)), [], h0.copy(), c0.copy()
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        h, (c, n, m) = h0[b], c0[:, b]
        c, m = np.where(n == 0, 0.0, c), np.where(n == 0, -np.inf, m)
        for step, t in enumerate(reversed(range(length)) if reverse else range(length)):
            boundary = t + 1 if reverse else t
            reset = resets is not None and (step > 0 or not reverse) and bool(resets[boundary, b])
            if reset:
                h, c, n, m = np.zeros_like(h), np.zeros_like(c), np.zeros_like(n), np.full_like(m, -np.inf)
            h_in = h if dropout_h is None else h * dropout_h[b]
            before = h_in, c, n
            z = weight_ih @ x[t, b] + weight_hh @ h_in + (0.0 if bias_ih is None else bias_ih + bias_hh)
            z_i, z_f, z_g, z_o = np.split(z, 4)
            log_f, g, o = -np.logaddexp(0.0, -z_f), np.tanh(z_g), sigmoid(z_o)
            kept = log_f + m
            m = np.maximum(kept, z_i)
            i, f = np.exp(z_i - m), np.exp(kept - m)
            c, n = f * c + i * g, f * n + i
            out[t, b] = h = o * c / n
            tape.append((b, t, reset, *before, i, f, sigmoid(-z_f), g, o, c, n))
        h_n[b], last[0, b], last[1, b], last[2, b] = h, c, n, m
    c, n, m = last
    some = np.where(n == 0, 1.0, n)
    c_n = np.where(n == 0, 0.0, [c / some, np.ones_like(n), m + np.log(some)]).view(type(n))
    return out, h_n, c_n, (tape, last)


def slstm_layer_gradients(x, h0, c0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *absent, tape, dh, dh_n, dc_n,
                          dropout_h=None):  # fmt: skip
    """As `layer_gradients`, of an sLSTM, dc_n [3, B, H].

    A step's m, which scales its c and n, has no gradient, since no result depends on it.
    """
    every = x, weight_ih, weight_hh, bias_ih, bias_hh
    dx, dw_ih, dw_hh, db_ih, db_hh = (None if a is None else np.zeros(a.shape) for a in every)
    tape, (c, n, _) = tape
    some, (dq, _, dl) = np.where(n == 0, 1.0, n), np.where(n == 0, 0.0, dc_n)
    into_h, into_c = dh_n.copy(), np.stack([dq / some, dl / some - dq * c / some**2, dl])
    for b, t, reset, h_in, c_prev, n_prev, i, f, not_f, g, o, c, n in reversed(tape):
        grad_h = dh[t, b] + into_h[b]
        grad_c, grad_n = into_c[0, b] + grad_h * o / n, into_c[1, b] - grad_h * o * c / n**2
        dz_i, of_kept = (grad_c * g + grad_n) * i, (grad_c * c_prev + grad_n * n_prev) * f
        dz = np.concatenate([dz_i, of_kept * not_f, grad_c * i * (1 - g**2), grad_h * c / n * o * (1 - o)])
        dx[t, b] = weight_ih.T @ dz
        dw_ih += np.outer(dz, x[t, b])
        dw_hh += np.outer(dz, h_in)
        if bias_ih is not None:
            db_ih += dz
            db_hh += dz
        into_h[b] = (1.0 if dropout_h is None else dropout_h[b]) * (weight_hh.T @ dz)
        into_c[0, b], into_c[1, b], into_c[2, b] = grad_c * f, grad_n * f, of_kept
        if reset:
            into_h[b], into_c[:, b] = 0, 0
    return dx, into_h, into_c, dw_ih, dw_hh, db_ih, db_hh, *absent, None, None


def functions_of(h0, weight_hh, c0=None):
    """The layer of these sizes and its gradients: a GRU has three rows a unit, an sLSTM c, n and m in c0."""
    if c0 is not None and c0.ndim == 3:
        return slstm_layer, slstm_layer_gradients
    return (gru_layer, gru_layer_gradients) if len(weight_hh) == 3 * h0.shape[1] else (layer, layer_gradients)


def stack(x, states, layers, *, lengths=None, resets=None, noises=None, residual=False, reverse=False):
    """Layers on top of each other: (y [T, B, D*P], final states [L][D], tapes [L] for `stack_gradients`).

    For every layer and direction, [L][D]: `states` (h0, c0), `layers` the weights, `noises` the masks and zones, and
    what resets leave. `reverse`: the first direction, too.
    """
    valid = np.arange(len(x))[:, None] < (len(x) if lengths is None else np.asarray(lengths))  # [T, B] or [T, 1]
    finals, tapes = [], []
    for k, directions in enumerate(layers):
        outputs, final, taken = [], [], []
        for d, weights in enumerate(directions):
            noise, inputs = {} if noises is None else noises[k][d], (x, *states[k][d], *weights)
            run, _ = functions_of(inputs[1], weights[1], inputs[2])
            h, h_n, c_n, tape = run(*inputs, lengths=lengths, resets=resets, reverse=reverse or d == 1, **noise)
            outputs.append(h)
            final.append((h_n, c_n))
            taken.append((inputs, noise, tape))
        y = np.concatenate(outputs, axis=2)
        passed = valid[:, :, None] * (residual and x.shape == y.shape)  # the share of x that is added to y
        x = passed * x + y if passed.any() else y
        finals.append(final)
        tapes.append((passed, taken))
    return x, finals, tapes


def stack_gradients(tapes, dy, dfinals):
    """Gradients of x, of the states [L][D], of the weights [L][D], and of what resets leave [L][D]."""
    dstates, dweights, dleft = [], [], []
    for (passed, taken), dfinal in zip(reversed(tapes), reversed(dfinals)):
        found = [
            functions_of(inputs[1], inputs[4], inputs[2])[1](*inputs, tape=tape, dh=dh, dh_n=dh_n, dc_n=dc_n, **noise)
            for (inputs, noise, tape), dh, (dh_n, dc_n) in zip(taken, np.split(dy, len(taken), axis=2), dfinal)
        ]
        dx = sum(dx for dx, *_ in found)
        dy = dx + passed * dy if passed.any() else dx
        dstates.insert(0, [(dh0, dc0) for _, dh0, dc0, *_ in found])
        dweights.insert(0, [weights for _, _, _, *weights, _, _ in found])
        dleft.insert(0, [(dreset_h, dreset_c) for *_, dreset_h, dreset_c in found])
    return dy, dstates, dweights, dleft
