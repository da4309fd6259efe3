// Which step of a sequence is at which time. A row of a [T*B, *] tensor is time * B + batch.
//
// A step counts in the order of processing. With a sequence of length L in a batch padded to T:
//
//     forward   step s visits time s
//     reverse   step s visits time L - 1 - s
//     padding   steps s >= L visit time s in both directions, so that each padded position is visited once
__device__ inline int time_of(int step, int length, bool reverse) {
    return reverse && step < length ? length - 1 - step : step;
}

__device__ inline long long row_of(int time, int batch, int B) { return static_cast<long long>(time) * B + batch; }

// Sequences past the batch have no steps.
__device__ inline int length_of(const int* lengths, int batch, int T, int B) {
    return lengths != nullptr ? load_if(batch < B, lengths + batch) : batch < B ? T : 0;
}

// Whether the state is zeroed before the step at `time`. A reset at t separates time t from time t - 1 in both
// directions; the reverse direction comes from time + 1.
__device__ inline bool is_reset(const bool* resets, int time, int length, int batch, int B, bool reverse) {
    const int later = reverse ? time + 1 : time;  // of the two times that a reset may separate
    return resets != nullptr && load_if(later < length, resets + row_of(later, batch, B));
}

// Where one sequence is at one step.
struct Position {
    const int time;
    const long long row;       // in [T*B, *]
    const long long row_prev;  // in c0 [B, H] at step 0, in c [T*B, H] after: of the state before
    const bool valid;          // not in the padding, nor past the batch
    const bool continues;      // valid, and the step starts from the state before, not from zeros
    const bool last;           // the final states are those after this step

    __device__ Position(int step, int batch, int length, const bool* resets, int B, bool reverse)
        : time(time_of(step, length, reverse)),
          row(row_of(time, batch, B)),
          row_prev(step == 0 ? batch : row_of(reverse ? time + 1 : time - 1, batch, B)),
          valid(step < length),
          continues(valid & !is_reset(resets, time, valid ? length : 0, batch, B, reverse)),
          last(step == length - 1) {}
};
