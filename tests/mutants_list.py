"""The faults of mutants.py: where mechanical ones are drawn, written ones, and what is no fault."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where mechanical faults are drawn, and the tests that must catch them."""

    file: str
    draws: int
    tests: str
    builds: bool = True


MASK = " ".join(
    f"tests/test_mask_{name}.py" for name in ("sequences", "h", "rows", "positions", "cached")
)
HOST = "tests/gpu_host"
FORWARD = f"{HOST}/test_forward_kernel.py"
BACKWARD = f"{HOST}/test_backward_kernel.py"
PLACES = (
    Place("csrc/mask.h", 11, MASK, False),
    Place("csrc/check_array.c", 1, "tests/test_dtypes.py tests/test_messages.py"),
    Place(
        "csrc/check_attention.c",
        2,
        "tests/test_sdpa.py tests/test_errors_sdpa.py tests/test_messages.py",
    ),
    Place(
        "csrc/check_keys.c",
        2,
        "tests/test_errors_varlen.py tests/test_positions.py tests/test_varlen.py",
    ),
    Place("csrc/check_pages.c", 1, "tests/test_errors_kvcache.py tests/test_varlen_pages.py"),
    Place("csrc/check_out.c", 2, "tests/test_memory.py tests/test_messages.py"),
    Place(
        "csrc/check_scores.c",
        1,
        "tests/test_messages.py tests/test_values.py -k 'messages or test_feature'",
    ),
    Place("csrc/check_sparsek.c", 3, "tests/test_errors_sparsek.py tests/test_sparsek.py"),
    Place("csrc/cpu/sparsek.c", 2, "tests/test_sparsek.py"),
    Place("csrc/cpu/sparsek_backward.c", 2, "tests/test_sparsek.py"),
    Place(
        "csrc/views.c",
        2,
        "tests/test_views.py tests/test_sizes.py tests/test_memory_order.py tests/test_memory.py",
    ),
    Place(
        "kernels/common/schedule.h", 2, f"{HOST}/test_schedule.py {HOST}/test_sections.py", False
    ),
    Place(
        "kernels/common/packed.h", 2, f"{HOST}/test_sections.py {HOST}/test_packed_lists.py", False
    ),
    Place(
        "kernels/common/mask_bits.h", 2, f"{HOST}/test_mask_bits.py {HOST}/test_positions.py", False
    ),
    Place("kernels/common/merge_plan.h", 2, f"{HOST}/test_stacks.py {HOST}/test_merging.py", False),
    Place("kernels/sm90/fwd_choice.h", 1, f"{HOST}/test_choice.py", False),
    Place("kernels/sm90/fwd_cost.h", 1, f"{HOST}/test_choice.py {HOST}/test_positions.py", False),
    Place("kernels/sm90/loads.h", 2, f"{HOST}/test_choice.py", False),
    Place("kernels/sm90/fwd_workspace.h", 1, f"{HOST}/test_workspace.py", False),
    Place("kernels/sm90/bwd_choice.h", 6, f"{HOST}/test_backward_choice.py", False),
    Place("kernels/sm90/decode_cache.h", 1, f"{HOST}/test_backend.py", False),
    Place("kernels/common/empty.h", 1, f"{HOST}/test_workspace.py", False),
)

# (file, line, what it becomes, why no input can tell them apart)
EQUIVALENT = (
    (
        "csrc/mask.h",
        "fa_sequence s = {{0, 0, 0, 0, 0, 0}, 0, sq, 0};",
        "fa_sequence s = {{0, 0, 0, 0, 0, 1}, 0, sq, 0};",
        "Every path of fa_find_sequence() sets all of s.lengths before it returns.",
    ),
    (
        "kernels/common/merge_plan.h",
        "for (int32_t width = 16; width >= 4; width /= 2) {",
        "for (int32_t width = 16; width >= 3; width /= 2) {",
        "16 halves to 8, 4 and 2: it never is 3.",
    ),
)

VALUES = "tests/test_values.py -k 'test_feature and {}'"
FAULTS = (
    # ---- the CPU backend
    (
        "csrc/cpu/forward_rows.h",
        "scores->sink[(c->group->h + p->row[j * LANES + i].head) * scores->sink_stride];",
        "scores->sink[c->group->h * scores->sink_stride];",
        VALUES.format("sink"),
    ),
    (
        "csrc/cpu/forward_rows.h",
        "scores->alibi_slopes[g->b * stride[0] + (g->h + row.head) * stride[1]];",
        "scores->alibi_slopes[(g->h + row.head) * stride[1]];",
        VALUES.format("alibi"),
    ),
    (
        "csrc/cpu/forward_rows.h",
        "const real gain = drops ? (real)c->p->dropout.gain : 1;",
        "const real gain = 1;",
        "tests/test_dropout.py",
    ),
    (
        "csrc/cpu/forward_runs.h",
        "const int sees = hides ? see(c, first, count, &keys, seen) : n;",
        "const int sees = n;",
        "tests/test_positions.py tests/test_values.py -k 'reaches or feature or family'",
    ),
    (
        "csrc/cpu/forward_rows.h",
        "hv = h / (what->hq / what->hv);",
        "hv = h / (what->hq / what->hk);",
        "tests/test_shapes.py",
    ),
    (
        "csrc/cpu/forward_rows.h",
        "const ivec zero = empty | (ivec)(splat(gain) == 0);",
        "const ivec zero = (ivec)(splat(gain) == 0);",
        "tests/test_values.py -k promise_6",
    ),
    (
        "csrc/cpu/lists.c",
        "if (times > l->layers) l->layers = times;",
        "l->layers = l->cut_count > 0;",
        "tests/test_sparse_calls.py -k twice",
    ),
    (
        "csrc/cpu/lists.c",
        "if (is_whole && (begin >= hidden.end || stop <= hidden.begin))",
        "if (is_whole)",
        "tests/test_sparse.py -k float64",
    ),
    (
        "csrc/cpu/backward_lists.h",
        "task->dv + key * dv, c->dv, i, gate);",
        "task->dv + key * dv, c->dv, i, 1);",
        "tests/test_sparse.py -k float64",
    ),
    (
        "csrc/cpu/backward_lists.h",
        "for (int part = 1; part < task->parts; part++) {",
        "for (int part = 1; part < 1; part++) {",
        "tests/test_sparse_calls.py -k parts",
    ),
    (
        "csrc/cpu/merge.c",
        "return lse == INFINITY ? -INFINITY : lse;",
        "return lse;",
        "tests/test_numbers.py tests/test_merge.py -k inf",
    ),
    (
        "csrc/cpu/sparsek_stream.h",
        "const double middle = 0.5 * first + 0.5 * s->last;",
        "const double middle = first;",
        "tests/test_sparsek.py -k hand",
    ),
    (
        "csrc/cpu/sparsek_stream.h",
        "if (tau > s->tau) s->tau = tau;",
        "s->tau = tau;",
        "tests/test_sparsek.py -k never_falls",
    ),
    (
        "csrc/cpu/sparsek_stream.h",
        "if (c - s->base > 1) stream_move_base(s, c);",
        "",
        "tests/test_sparsek.py -k long",
    ),
    (
        "csrc/cpu/sparsek.c",
        "equal-- <= 0",
        "equal-- < 0",
        "tests/test_sparsek.py -k random_calls",
    ),
    (
        "csrc/cpu/sparsek_means.h",
        "s->size[s->runs[j].begin]++, s->size[s->runs[j].end]--;",
        "s->size[s->runs[j].begin]++;",
        "tests/test_sparsek_gradients.py -k range",
    ),
    (
        "csrc/cpu/half.h",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16;",
        "(bits + 0x8000) >> 16;",
        "tests/test_rounding.py",
    ),
    (
        "csrc/philox.h",
        "round < 7",
        "round < 6",
        "tests/test_dropout.py -k philox",
        False,
    ),
    # ---- dispatch, checks, table of types
    (
        "csrc/dispatch.c",
        "p.dropout.first_b += p.what.b;",
        "p.dropout.first_b += 1;",
        "tests/test_dropout.py",
    ),
    (
        "csrc/dispatch.c",
        "step = 1 - plan->outer_shape[i], index[i] = 0;",
        "step = -plan->outer_shape[i], index[i] = 0;",
        "tests/test_outer.py",
    ),
    (
        "csrc/check_attention.c",
        "TRY(fa_check_masks(r, plan, error));",
        "(void)fa_check_masks(r, plan, error);",
        "tests/test_errors_varlen.py tests/test_positions.py",
    ),
    (
        "csrc/check_sparsek.c",
        "request.right = -r->window;",
        "request.right = 0;",
        "tests/test_sparsek.py -k hand",
    ),
    (
        "csrc/check_out.c",
        "r->seed,      r->q_offset,",
        "r->q_offset,",
        "tests/test_overlaps.py",
    ),
    (
        "csrc/dtype.h",
        '{"bool", 1, 6}',
        '{"bool", 1, 1}',
        "tests/test_messages.py",
    ),
    (
        "csrc/views.c",
        "tensor->shape[0] = v.lead_shape[0], tensor->stride[0] = v.lead_stride[0];",
        "tensor->shape[0] = v.lead_shape[0], tensor->stride[0] = v.tensor.stride[1];",
        "tests/test_merge.py -k test_parts_of_the_keys",
    ),
    # ---- the binding
    (
        "csrc/binding/tensor.c",
        "    Py_XDECREF(shape);\n    Py_XDECREF(strides);\n",
        "    Py_XDECREF(shape);\n",
        "tests/test_leaks.py -k empty",
    ),
    (
        "csrc/binding/call.c",
        "if (c->has_out) tensor_release(&c->out);",
        "",
        "tests/test_leaks.py -k 'never_written or is_frozen'",
    ),
    (
        "csrc/binding/call.c",
        "p && is_tiny(p) ? NULL : PyEval_SaveThread();",
        "NULL;",
        "tests/test_process.py -k gil",
    ),
    (
        "csrc/binding/call.c",
        "    if (status == FA_OK && c->has_out) status = torch_mark_written(c->state, &c->out);\n",
        "",
        "tests/test_torch.py -k autograd",
    ),
    # ---- host code of the kernels
    (
        "kernels/common/packed.h",
        "return (int64_t)total / size + b + 1;",
        "return (int64_t)total / size + b;",
        f"{HOST}/test_packed_lists.py {HOST}/test_mask_bits.py",
        False,
    ),
    (
        "kernels/common/head_parts.h",
        "fa_heads_of(&w->v, i / (parts / w->hv), 1, size);",
        "fa_heads_of(&w->v, i / (parts / w->hk), 1, size);",
        f"{HOST}/test_positions.py",
        False,
    ),
    (
        "kernels/common/schedule.h",
        "s->causal && r & 1 ? blocks - 1 - block : block;",
        "block;",
        f"{HOST}/test_schedule.py",
        False,
    ),
    (
        "kernels/common/merge.cuh",
        "{ return lse == INFINITY ? -INFINITY : lse; }",
        "{ return lse; }",
        f"{HOST}/test_merging.py",
        False,
    ),
    (
        "kernels/common/merge.cuh",
        "    if (weight == 0) return;\n",
        "",
        f"{HOST}/test_merging.py",
        False,
    ),
    (
        "kernels/common/merge_plan.h",
        "!(stack && stack->out_step * size % width);",
        "1;",
        f"{HOST}/test_stacks.py",
        False,
    ),
    # ---- the forward kernel, threads as fibers
    (
        "kernels/sm90/fwd_products.cuh",
        "k + i / 4 * (PANEL_N / 16) + i % 4 * 2",
        "k + i / 4 * (PANEL_Q / 16) + i % 4 * 2",
        FORWARD,
        False,
    ),
    (
        "kernels/sm90/fwd_attend.cuh",
        "    wgmma_wait_group<PENDING>();\n    pass_turn(warpgroup);\n    wgmma_accumulators(s);\n"
        "    release(smem_address(&smem.k_empty[kv.stage]));\n",
        "    release(smem_address(&smem.k_empty[kv.stage]));\n"
        "    wgmma_wait_group<PENDING>();\n    pass_turn(warpgroup);\n    wgmma_accumulators(s);\n",
        FORWARD,
        False,
    ),
    (
        "kernels/sm90/fwd_visibility.cuh",
        "if (row < begin || row >= end) ((uint4 *)v)[i]",
        "if (row >= end) ((uint4 *)v)[i]",
        FORWARD,
        False,
    ),
    (
        "kernels/sm90/fwd_visibility.cuh",
        "bool part = key < whole.begin || key + BLOCK_N > whole.end;",
        "bool part = key + BLOCK_N > whole.end;",
        FORWARD,
        False,
    ),
    # ---- the decode kernel, and what comes before and after it
    (
        "kernels/sm90/decode_args.cuh",
        "before += __shfl_sync(~0u, past ? sum - count : sum, found);",
        "before += __shfl_sync(~0u, sum, found);",
        f"{HOST}/test_backend.py",
        False,
    ),
    (
        "kernels/sm90/decode_append.cuh",
        "a.lengths[b] = fa_keys_before(&c, b) + c.s_new;",
        "a.lengths[b] = fa_keys_before(&c, b);",
        f"{HOST}/test_backend.py",
        False,
    ),
    (
        "kernels/sm90/decode_append.cuh",
        "(c.rotary.advances ? i - first : 0);",
        "(c.rotary.advances ? i : 0);",
        f"{HOST}/test_backend.py",
        False,
    ),
    (
        "kernels/sm90/decode_mass.cuh",
        "if (key < keys.begin || key >= keys.end || lse == -INFINITY) return 0.f;",
        "if (key >= keys.end || lse == -INFINITY) return 0.f;",
        f"{HOST}/test_backend.py",
        False,
    ),
    (
        "kernels/sm90/decode_run.cuh",
        "if (sums == 1) return launch_empty(p, device, error);",
        "if (sums == 1) return FA_OK;",
        f"{HOST}/test_backend.py",
        False,
    ),
    # ---- the backward kernel
    (
        "kernels/sm90/bwd_ahead.cuh",
        "const uint32_t q = n % Q_STAGES;",
        "const uint32_t q = n % STAGES;",
        f"{BACKWARD} -k f16_d128",
        False,
    ),
    (
        "kernels/sm90/bwd_turns.cuh",
        "while (load_acquire(counter) < turn) continue;",
        "",
        f"{HOST}/test_backward_turns.py -k bf16_d128",
        False,
    ),
    (
        "kernels/sm90/bwd_smem.h",
        "return SHARED_OUT ? ROWS * warpgroup : 0;",
        "return 0;",
        f"{BACKWARD} -k d192",
        False,
    ),
    (
        "kernels/sm90/bwd_load_strided.cuh",
        "y[j] = j < there ? at[j * from.stride[3]] : 0;",
        "y[j] = at[j * from.stride[3]];",
        f"{BACKWARD} -k strided",
        False,
    ),
    (
        "kernels/sm90/bwd_store.cuh",
        "    if (column + 1 < to.shape[3]) row",
        "    row",
        f"{BACKWARD} -k strided",
        False,
    ),
    (
        "kernels/sm90/bwd_sink.cuh",
        "if (keys.begin < keys.end && a.delta)",
        "if (a.delta)",
        BACKWARD,
        False,
    ),
)

# What only a GPU shows, in the variants that those tests then choose.
GPU_VARIANTS = "^sm90_fwd_bf16_d128_(2x128|general)$"
GPU_FAULTS = (
    (
        "kernels/common/launch.cuh",
        "    shape.stream = (cudaStream_t)stream;\n",
        "",
        "tests/gpu/test_merging.py tests/gpu/test_streams_and_devices.py"
        " -k test_runs_on_the_current_stream",
    ),
    (
        "kernels/sm90/fwd_out.cuh",
        "        e.inverse[r] *= a.scores.gain;\n",
        "",
        "tests/gpu/test_scores.py -k 'test_score_changes and dropout and bf16 and 128'",
    ),
    (
        "kernels/sm90/fwd_out.cuh",
        "row < t.lengths.sq ? lse : -INFINITY;",
        "lse;",
        "tests/gpu/test_scores.py -k 'test_everything_together and 128 and sink and bool'",
    ),
)
