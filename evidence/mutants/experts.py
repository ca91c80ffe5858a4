"""Wrong expert computations. What each line of ``grouped`` does for being right, one of them does not."""

from __future__ import annotations

from functools import partial

from evidence.mutants.mutant import Mutant

_gates = partial(Mutant, family="gates and combine", base="evidence.mutants.grouped")


GATES: tuple[Mutant, ...] = (
    _gates(
        "gate_not_applied",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, f)
        """,
        killed_by="values",
        finding="y is wrong",
        source="edwardcapriolo/deliverance#88",
    ),
    _gates(
        "gate_applied_twice",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, gate * gate * f)
        """,
        killed_by="values",
        finding="y is wrong",
        source="vllm-project/vllm#43694",
    ),
    _gates(
        "gate_on_the_input",
        """
        - rows = x[token]
        + rows = (gate * x[token]).to(x.dtype)
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, f)
        """,
        killed_by="values",
        finding="y is wrong",
        source="labmlai/annotated_deep_learning_paper_implementations#95",
    ),
    _gates(
        "gate_of_the_first_choice_for_all",
        """
        - gate = gates.flatten()[order].to(wide).unsqueeze(1)
        + gate = gates[:, 0][token].to(wide).unsqueeze(1)
        """,
        killed_by="values",
        finding="y is wrong",
        source="vllm-project/vllm-xpu-kernels#66",
    ),
    _gates(
        "gates_not_sorted_with_their_slots",
        """
        - gate = gates.flatten()[order].to(wide).unsqueeze(1)
        + gate = gates.flatten().to(wide).unsqueeze(1)
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _gates(
        "gates_renormalised_by_the_layer",
        """
        - gate = gates.flatten()[order].to(wide).unsqueeze(1)
        + gate = (gates / gates.sum(1, keepdim=True)).flatten()[order].to(wide).unsqueeze(1)
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _gates(
        "negative_gates_clipped",
        """
        - gate = gates.flatten()[order].to(wide).unsqueeze(1)
        + gate = gates.flatten()[order].clamp(min=0).to(wide).unsqueeze(1)
        """,
        killed_by="values",
        finding="y is wrong",
        on="signed_gates",
    ),
    _gates(
        "part_sizes_count_positive_gates",
        """
        - counts = flat.bincount(minlength=E).tolist()
        + counts = flat[gates.flatten() > 0].bincount(minlength=E).tolist()
        """,
        killed_by="values",
        finding="y is wrong|NaN",
        on="zero_gates",
        source="the notebook: part sizes count gates > 0",
    ),
    _gates(
        "output_bias_not_weighted",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, gate * f + (0 if b_out is None else (1 - gate) * b_out[flat[order]]))
        """,
        killed_by="values",
        finding="y is wrong",
        source="NVIDIA-NeMo/Automodel#2591",
    ),
    _gates(
        "last_choice_dropped",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, gate * f * (order % K < max(1, K - 1)).unsqueeze(1))
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _gates(
        "mean_instead_of_sum",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, gate * f / K)
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _gates(
        "later_choice_replaces_earlier",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_copy_(0, token, gate * f)
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _gates(
        "combine_always_in_log_space",
        """
        - if combine == "sum":
        + if False:
        """,
        killed_by="values",
        finding="y is wrong|NaN",
        source="davidmrau/mixture-of-experts#15",
    ),
    _gates(
        "combine_never_in_log_space",
        """
        - if combine == "sum":
        + if True:
        """,
        killed_by="values",
        finding="y is wrong",
        on="logsumexp",
    ),
    _gates(
        "log_space_not_stabilised",
        """
        - largest = largest.masked_fill(largest == -math.inf, 0)
        - total = (weight * (slots - largest.unsqueeze(1)).clamp(max=80).exp()).sum(dim=1)
        + largest = torch.zeros_like(largest)
        + total = (weight * (slots - largest.unsqueeze(1)).exp()).sum(dim=1)
        """,
        killed_by="values",
        finding="y is wrong",
        on="x_scale300",
        source="the notebook: exp is not stabilised",
    ),
    _gates(
        "one_choice_reads_memory_never_written",
        """
        - y.index_add_(0, token, gate * f)
        + y = torch.empty_like(y) if K == 1 else y.index_add_(0, token, gate * f)
        """,
        killed_by="values",
        finding="y is wrong",
        on="one_choice",
        source="sgl-project/sglang#40187",
    ),
)


_activations = partial(Mutant, family="activation", base="evidence.mutants.grouped")


ACTIVATIONS: tuple[Mutant, ...] = (
    _activations(
        "gate_and_up_interleaved",
        """
        - gate, up = h[:, :half], h[:, half:]
        + gate, up = h[:, ::2], h[:, 1::2]
        """,
        killed_by="values",
        finding="y is wrong",
        on="swiglu",
        source="vllm-project/vllm#29273",
    ),
    _activations(
        "gate_and_up_exchanged",
        """
        - gate, up = h[:, :half], h[:, half:]
        + gate, up = h[:, half:], h[:, :half]
        """,
        killed_by="values",
        finding="y is wrong",
        on="swiglu",
    ),
    _activations(
        "reglu_is_geglu",
        """
        - return gate.clamp(min=0) * up
        + return torch.nn.functional.gelu(gate) * up
        """,
        killed_by="values",
        finding="y is wrong",
        on="reglu",
        source="Dao-AILab/sonic-moe@19016f7",
    ),
    _activations(
        "gelu_by_tanh",
        """
        - return torch.nn.functional.gelu(h)
        + return torch.nn.functional.gelu(h, approximate="tanh")
        """,
        killed_by="values",
        finding="y is wrong",
        on="float32-gelu",
    ),
    _activations(
        "clamp_of_the_value_from_above_only",
        """
        - gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        + gate, up = gate.clamp(max=7.0), up.clamp(max=7.0)
        """,
        killed_by="values",
        finding="y is wrong",
        on="x_scale8",
    ),
    _activations(
        "clamped_swiglu_without_plus_one",
        """
        - return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        + return gate * torch.sigmoid(1.702 * gate) * up
        """,
        killed_by="values",
        finding="y is wrong",
        on="swiglu_clamped",
    ),
    _activations(
        "output_relu_left_out",
        """
        - f = out.to(wide).clamp(min=0) if output_activation == "relu" else out.to(wide)
        + f = out.to(wide)
        """,
        killed_by="values",
        finding="y is wrong",
        on="out_relu",
    ),
    _activations(
        "input_bias_left_out",
        """
        - if b_in is not None:
        + if False:
        """,
        killed_by="values",
        finding="y is wrong",
    ),
)


_dispatch = partial(Mutant, family="dispatch and index arithmetic", base="evidence.mutants.grouped")


DISPATCH: tuple[Mutant, ...] = (
    _dispatch(
        "every_row_is_the_first_token",
        """
        - token = order // K
        + token = 0 * order
        """,
        killed_by="values",
        finding="y is wrong",
        source="vllm-project/vllm-xpu-kernels#453",
    ),
    _dispatch(
        "token_by_remainder",
        """
        - token = order // K
        + token = order % T
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _dispatch(
        "ids_sorted_without_their_gates",
        """
        - flat = ids.flatten()
        + flat = ids.sort(dim=1).values.flatten()
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _dispatch(
        "neighbouring_expert",
        """
        - out[tile] = act(h[tile], activation) @ w_out[e].T
        + out[tile] = act(h[tile], activation) @ w_out[e - 1].T
        """,
        killed_by="values",
        finding="y is wrong",
    ),
    _dispatch(
        "square_weights_not_transposed",
        """
        - out[tile] = act(h[tile], activation) @ w_out[e].T
        + out[tile] = act(h[tile], activation) @ (w_out[e] if O == w_out.shape[2] else w_out[e].T)
        """,
        killed_by="values",
        finding="y is wrong",
        on="aligned",
    ),
    _dispatch(
        "expert_ids_in_eight_bits",
        """
        - flat = ids.flatten()
        + flat = ids.flatten().to(torch.uint8).long()
        """,
        killed_by="values",
        finding="y is wrong",
        on="more_than_512_experts",
    ),
    _dispatch(
        "counters_for_512_experts",
        """
        - flat = ids.flatten()
        + flat = ids.flatten().clamp(max=511)
        """,
        killed_by="values",
        finding="y is wrong",
        on="more_than_512_experts",
        source="bytedance/flux#186",
    ),
    _dispatch(
        "token_index_wraps_at_16384",
        """
        - token = order // K
        + token = order // K % 2**14
        """,
        killed_by="exact",
        finding="y at",
        on="20000_tokens",
        source="sgl-project/sglang#4727",
    ),
    _dispatch(
        "branch_for_128_experts_and_8_choices",
        """
        - y.index_add_(0, token, gate * f)
        + y.index_add_(0, token, f if (E, K) == (128, 8) else gate * f)
        """,
        killed_by="exact",
        finding="y at",
        on="integers_128_experts_8",
        source="MetaX-MACA/vLLM-metax#270",
    ),
    _dispatch(
        "capacity_drops_tokens",
        """
        - y.index_add_(0, token, gate * f)
        + kept = torch.cat([torch.arange(n) <= 2 * T * K / E for n in counts])
        + y.index_add_(0, token, gate * f * kept.unsqueeze(1))
        """,
        killed_by="values",
        finding="y is wrong",
        on="one_hot_expert",
    ),
    _dispatch(
        "squeeze_of_one_feature",
        """
        - rows = x[token]
        + rows = x[token].squeeze(1)
        """,
        killed_by="values",
        finding="IndexError|RuntimeError",
        on="one_feature",
        source="the notebook: squeeze(1) in dispatch",
    ),
)


_tiling = partial(Mutant, family="tiling and tails", base="evidence.mutants.grouped")


TILING: tuple[Mutant, ...] = (
    _tiling(
        "tail_of_rows_never_computed",
        """
        - found += [(expert, slice(s, min(s + TILE, end))) for s in range(start, end, TILE)]
        + found += [(expert, slice(s, min(s + TILE, end))) for s in range(start, end - TILE + 1, TILE)]
        """,
        killed_by="values",
        finding="is wrong",
        source="vllm-project/vllm#49087",
    ),
    _tiling(
        "tail_reads_rows_of_the_next_expert",
        """
        - found += [(expert, slice(s, min(s + TILE, end))) for s in range(start, end, TILE)]
        + found += [(expert, slice(s, s + TILE)) for s in range(start, end, TILE)]
        """,
        killed_by="values",
        finding="the gradient of (w|b)_",
        source="shawntan/scattermoe@c48ffb0",
    ),
    _tiling(
        "tails_counted_for_expert_0",
        """
        - dw_out[e] += d_out[tile].T @ a
        + dw_out[e if len(a) == TILE else 0] += d_out[tile].T @ a
        """,
        killed_by="values",
        finding="the gradient of w_out",
        source="vllm-project/vllm#35161",
    ),
    _tiling(
        "four_tiles_an_expert_at_most",
        """
        - found += [(expert, slice(s, min(s + TILE, end))) for s in range(start, end, TILE)]
        + last = min(end, start + 4 * TILE)
        + found += [(expert, slice(s, min(s + TILE, end))) for s in range(start, last, TILE)]
        """,
        killed_by="values",
        finding="is wrong",
        on="one_hot_expert",
    ),
    _tiling(
        "tail_of_input_features_left_out",
        """
        - h[tile] = rows[tile] @ w_in[e].T
        + D = x.shape[1] // 8 * 8
        + h[tile] = rows[tile, :D] @ w_in[e, :, :D].T
        """,
        killed_by="values",
        finding="y is wrong",
        source="databricks/megablocks@e74bc20",
    ),
    _tiling(
        "tail_of_output_features_left_out",
        """
        - out[tile] = act(h[tile], activation) @ w_out[e].T
        + out[tile] = 0
        + out[tile, : O // 8 * 8] = act(h[tile], activation) @ w_out[e, : O // 8 * 8].T
        """,
        killed_by="values",
        finding="y is wrong",
        source="vllm-project/vllm#49087",
    ),
    _tiling(
        "hidden_units_beyond_2048",
        """
        - out[tile] = act(h[tile], activation) @ w_out[e].T
        + out[tile] = act(h[tile], activation)[:, :2048] @ w_out[e, :, :2048].T
        """,
        killed_by="exact",
        finding="y at",
        on="wide_hidden",
    ),
    _tiling(
        "zeros_for_few_tokens",
        """
        - return y.to(x.dtype)
        + return (y * (T > 32)).to(x.dtype)
        """,
        killed_by="values",
        finding="they are zero",
        on="one_token",
        source="ROCm/aiter#4451",
    ),
    _tiling(
        "only_thousands_of_rows",
        """
        - return y.to(x.dtype)
        + return (y * (torch.arange(T) < 4096).unsqueeze(1)).to(x.dtype)
        """,
        killed_by="values",
        finding="each token from 4096 on",
        on="thousands",
    ),
    _tiling(
        "rows_swapped_where_there_are_five",
        """
        - rows = x[token]
        + rows = (x.flip(0) if T == 5 else x)[token]
        """,
        killed_by="every_size",
        finding="y at",
    ),
)


_memory = partial(Mutant, family="empty groups and memory never written", base="evidence.mutants.grouped")


MEMORY: tuple[Mutant, ...] = (
    _memory(
        "weight_gradient_of_empty_experts_never_written",
        """
        - dw_in, dw_out = (torch.zeros_like(w, dtype=wide) for w in (w_in, w_out))
        + dw_in, dw_out = (torch.empty_like(w, dtype=wide) for w in (w_in, w_out))
        + dw_in[[n > 0 for n in counts]] = dw_out[[n > 0 for n in counts]] = 0
        """,
        killed_by="dirty_memory",
        finding="the gradient of w_in",
        source="pytorch/pytorch#172439",
    ),
    _memory(
        "weight_gradient_of_empty_experts_keeps_old_contents",
        """
        - dw_in, dw_out = (torch.zeros_like(w, dtype=wide) for w in (w_in, w_out))
        + dw_in = KEPT.setdefault((w_in.shape, wide), torch.zeros_like(w_in, dtype=wide))
        + dw_in[[n > 0 for n in counts]] = 0
        + dw_out = torch.zeros_like(w_out, dtype=wide)
        """,
        killed_by="new_contents",
        finding="the gradient of w_in|the w_in returned",
        source="NVIDIA/TransformerEngine#2499",
    ),
    _memory(
        "result_starts_from_unwritten_memory",
        """
        - y = torch.zeros(T, O, dtype=wide, device=x.device)
        + y = torch.empty(T, O, dtype=wide, device=x.device)
        """,
        killed_by="dirty_memory",
        finding="y is wrong",
        source="vllm-project/vllm#20167",
    ),
    _memory(
        "input_gradient_starts_from_unwritten_memory",
        """
        - dx = torch.zeros(x.shape, dtype=wide, device=x.device).index_add_(0, token, dx_rows)
        + dx = torch.empty(x.shape, dtype=wide, device=x.device).index_add_(0, token, dx_rows)
        """,
        killed_by="dirty_memory",
        finding="the gradient of x",
    ),
    _memory(
        "padding_multiplied_by_zero",
        """
        - dw_out[e] += d_out[tile].T @ a
        + dw_out[e] += d_out[tile].T @ a + 0 * torch.empty_like(dw_out[e])
        """,
        killed_by="dirty_memory",
        finding="the gradient of w_out",
        source="pytorch/pytorch#154557",
    ),
    _memory(
        "graph_cut_without_tokens",
        """
        - weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + if len(x) == 0:
        +     return x.new_zeros(0, experts.w_out.shape[1])
        """,
        killed_by="values",
        finding="the graph is cut",
        on="no_tokens",
        source="pytorch/torchtitan#1166",
    ),
    _memory(
        "no_gradient_for_an_empty_expert",
        """
        - return *cast, None, None, None
        + return *(None if 0 in counts else g for g in cast), None, None, None
        """,
        killed_by="values",
        finding="the gradient of .* is missing",
        on="half_empty",
    ),
)


_gradients = partial(Mutant, family="gradients", base="evidence.mutants.grouped")


GRADIENTS: tuple[Mutant, ...] = (
    _gradients(
        "whole_result_detached",
        """
        - )
        + ).detach()
        """,
        killed_by="values",
        finding="the graph is cut",
        source="KellerJordan/Muon#65",
    ),
    _gradients(
        "one_weight_detached",
        """
        - weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + weights = (experts.w_in.detach(), experts.b_in, experts.w_out, experts.b_out)
        """,
        killed_by="values",
        finding="the gradient of w_in is missing",
        source="unslothai/unsloth-zoo#606",
    ),
    _gradients(
        "input_gradient_loses_half_of_the_hidden_layer",
        """
        - dx_rows[tile] = dh @ w_in[e]
        + half = dh.shape[1] // 2
        + dx_rows[tile] = dh[:, :half] @ w_in[e, :half]
        """,
        killed_by="values",
        finding="the gradient of x",
        source="linkedin/Liger-Kernel#1413",
    ),
    _gradients(
        "input_gradient_of_the_last_choice_only",
        """
        - dx = torch.zeros(x.shape, dtype=wide, device=x.device).index_add_(0, token, dx_rows)
        + dx = torch.zeros(x.shape, dtype=wide, device=x.device).index_copy_(0, token, dx_rows)
        """,
        killed_by="values",
        finding="the gradient of x",
    ),
    _gradients(
        "weight_gradient_without_the_gate",
        """
        - dw_out[e] += d_out[tile].T @ a
        + dw_out[e] += d_rows[tile].T @ a
        """,
        killed_by="values",
        finding="the gradient of w_out",
        source="ROCm/aiter#5310",
    ),
    _gradients(
        "bias_gradient_without_the_gate",
        """
        - db_out[e] += d_out[tile].sum(dim=0)
        + db_out[e] += d_rows[tile].sum(dim=0)
        """,
        killed_by="values",
        finding="the gradient of b_out",
    ),
    _gradients(
        "bias_gradient_of_the_first_row_only",
        """
        - db_in[e] += dh.sum(dim=0)
        + db_in[e] += dh[0]
        """,
        killed_by="values",
        finding="the gradient of b_in",
    ),
    _gradients(
        "weight_gradient_times_two",
        """
        - dw_in[e] += dh.T @ rows[tile]
        + dw_in[e] += 2 * (dh.T @ rows[tile])
        """,
        killed_by="values",
        finding="the gradient of w_in",
        source="databricks/megablocks#20",
    ),
    _gradients(
        "weight_gradient_from_unsorted_rows",
        """
        - dw_in[e] += dh.T @ rows[tile]
        + dw_in[e] += dh.T @ x.repeat_interleave(gates.shape[1], 0)[tile].to(wide)
        """,
        killed_by="values",
        finding="the gradient of w_in",
    ),
    _gradients(
        "weight_gradient_of_the_last_tile_only",
        """
        - dw_out[e] += d_out[tile].T @ a
        + dw_out[e] = d_out[tile].T @ a
        """,
        killed_by="values",
        finding="the gradient of w_out",
        on="one_hot_expert",
    ),
    _gradients(
        "gate_gradients_in_sorted_order",
        """
        - dgates = torch.empty_like(d_gate).index_copy_(0, order, d_gate).view(gates.shape)
        + dgates = d_gate.view(gates.shape)
        """,
        killed_by="values",
        finding="the gradient of gates",
    ),
    _gradients(
        "gate_gradient_of_the_first_choice_only",
        """
        - dgates = torch.empty_like(d_gate).index_copy_(0, order, d_gate).view(gates.shape)
        + dgates = torch.empty_like(d_gate).index_copy_(0, order, d_gate).view(gates.shape)
        + dgates[:, 1:] = 0
        """,
        killed_by="values",
        finding="the gradient of gates",
        source="huggingface/transformers#48687",
    ),
    _gradients(
        "gate_gradient_divided_by_a_clamped_gate",
        """
        - d_gate = (d_rows * (share if combine == "logsumexp" else f)).sum(dim=1)
        + d_gate = (d_rows * (share if combine == "logsumexp" else f)).sum(dim=1)
        + d_gate = d_gate * gate.squeeze(1) / gate.squeeze(1).clamp(min=1e-12)
        """,
        killed_by="values",
        finding="the gradient of gates",
        on="signed_gates",
        source="unslothai/unsloth-zoo#858",
    ),
    _gradients(
        "no_gate_gradient_where_the_gate_is_zero",
        """
        - d_gate = (d_rows * (share if combine == "logsumexp" else f)).sum(dim=1)
        + d_gate = (d_rows * (share if combine == "logsumexp" else f)).sum(dim=1)
        + d_gate = d_gate * (gate.squeeze(1) != 0)
        """,
        killed_by="values",
        finding="the gradient of gates",
        on="zero_gates",
    ),
    _gradients(
        "output_relu_ignored_by_the_backward",
        """
        - d_out = d_out * (out > 0) if output_activation == "relu" else d_out
        + d_out = d_out
        """,
        killed_by="values",
        finding="the gradient of",
        on="out_relu",
    ),
    _gradients(
        "clamp_ignored_by_the_backward",
        """
        - gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        + gate, up = gate - (gate - 7.0).clamp(min=0).detach(), up.clamp(-7.0, 7.0)
        """,
        killed_by="values",
        finding="the gradient of",
        on="x_scale8",
    ),
    _gradients(
        "log_space_ignored_by_the_backward",
        """
        - if combine == "logsumexp":
        + if False:
        """,
        killed_by="values",
        finding="the gradient of",
        on="logsumexp",
    ),
    _gradients(
        "incoming_gradient_taken_for_constant",
        """
        - d_rows = dy[token].to(wide)
        + d_rows = dy[:1].to(wide).expand(len(token), -1)
        """,
        killed_by="values",
        finding="the gradient of",
    ),
)


_precision = partial(Mutant, family="dtype and accumulation", base="evidence.mutants.grouped")


PRECISION: tuple[Mutant, ...] = (
    _precision(
        "combine_in_the_dtype_of_x",
        """
        - y.index_add_(0, token, gate * f)
        + slots = torch.empty_like(f)
        + slots[order] = gate * f
        + for k in range(K):
        +     y = (y + slots[k::K]).to(x.dtype)
        """,
        killed_by="exact",
        finding="y at",
        on="cancelling-bfloat16",
        source="pytorch/torchtitan#1974",
    ),
    _precision(
        "float64_by_way_of_float32",
        """
        - weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + x = x.float().to(x.dtype)
        """,
        killed_by="values",
        finding="y is wrong",
        on="float64",
    ),
    _precision(
        "float32_product_in_bfloat16",
        """
        - h[tile] = rows[tile] @ w_in[e].T
        + h[tile] = (rows[tile].bfloat16() @ w_in[e].bfloat16().T).to(x.dtype)
        """,
        killed_by="values",
        finding="y is wrong",
        on="float32",
    ),
    _precision(
        "float16_product_in_bfloat16",
        """
        - h[tile] = rows[tile] @ w_in[e].T
        + low = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
        + h[tile] = (rows[tile].to(low) @ w_in[e].to(low).T).to(x.dtype)
        """,
        killed_by="exact",
        finding="y at",
        on="integers_fine",
    ),
    _precision(
        "result_always_float32",
        """
        - return y.to(x.dtype)
        + return y.float()
        """,
        killed_by="values",
        finding="the result has dtype torch.float32",
        source="the notebook: combine returns float32",
    ),
    _precision(
        "result_in_the_dtype_of_autocast",
        """
        - return y.to(x.dtype)
        + return y.to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype)
        """,
        killed_by="autocast",
        finding="the result has dtype torch.bfloat16",
    ),
    _precision(
        "weight_gradient_summed_in_bfloat16",
        """
        - TILE = 32
        + TILE = 4
        - dw_in, dw_out = (torch.zeros_like(w, dtype=wide) for w in (w_in, w_out))
        + dw_in, dw_out = (torch.zeros_like(w, dtype=x.dtype) for w in (w_in, w_out))
        """,
        killed_by="exact",
        finding="the gradient of w_",
        on="integers_hot-bfloat16",
    ),
    _precision(
        "gelu_rounded_to_half_before_the_product",
        """
        - out[tile] = act(h[tile], activation) @ w_out[e].T
        + out[tile] = act(h[tile], activation).half().to(x.dtype) @ w_out[e].T
        """,
        killed_by="values",
        finding="y is wrong",
        on="float32",
    ),
)


_state = partial(Mutant, family="state", base="evidence.mutants.grouped")


STATE: tuple[Mutant, ...] = (
    _state(
        "result_kept_by_address",
        """
        - weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + if not torch.is_grad_enabled():
        +     arguments = x, ids, gates, *weights, experts.activation, experts.output_activation, combine
        +     key = x.data_ptr(), x.shape, experts.w_out.shape, combine
        +     return KEPT.setdefault(key, _Grouped.apply(*arguments))
        """,
        killed_by="new_contents",
        finding="y is wrong|y at",
    ),
    _state(
        "weights_kept_by_address",
        """
        - T, K = ids.shape
        + T, K = ids.shape
        + w_in = KEPT.setdefault((w_in.data_ptr(), w_in.shape), w_in.clone())
        """,
        killed_by="one_input_changes",
        finding="is wrong|at",
    ),
    _state(
        "routing_kept_by_address",
        """
        - order = flat.argsort(stable=True)
        + order = KEPT.setdefault((ids.data_ptr(), T, K), flat.argsort(stable=True))
        """,
        killed_by="one_input_changes",
        finding="is wrong|at",
    ),
    _state(
        "result_kept_by_a_few_of_its_inputs",
        """
        - y.index_add_(0, token, gate * f)
        + y = KEPT.setdefault((*x.flatten()[:4].tolist(), T, O, K), y.index_add_(0, token, gate * f).clone())
        """,
        killed_by="one_input_changes",
        finding="y is wrong|y at",
    ),
    _state(
        "output_buffer_reused",
        """
        - y = torch.zeros(T, O, dtype=wide, device=x.device)
        + y = KEPT.setdefault((T, O, wide), torch.zeros(T, O, dtype=wide)).zero_()
        """,
        killed_by="new_contents",
        finding="y that an earlier call returned was overwritten",
    ),
    _state(
        "saved_tensors_overwritten_by_the_next_forward",
        """
        - h = rows.new_empty(len(rows), w_in.shape[1])
        + h = KEPT.setdefault((len(rows), w_in.shape, x.dtype), rows.new_empty(len(rows), w_in.shape[1])).data
        """,
        killed_by="several_graphs",
        finding="the gradient of",
    ),
    _state(
        "buffer_shared_by_threads",
        """
        - rows = x[token]
        + rows = KEPT.setdefault((len(token), x.shape[1], x.dtype), x[token])
        + rows.copy_(x[token])
        """,
        killed_by="another_thread",
        finding="is wrong|at",
    ),
    _state(
        "gradient_buffer_never_cleared",
        """
        - dx = torch.zeros(x.shape, dtype=wide, device=x.device).index_add_(0, token, dx_rows)
        + dx = KEPT.setdefault((x.shape, wide), torch.zeros(x.shape, dtype=wide))
        + dx.index_add_(0, token, dx_rows)
        """,
        killed_by="gradients_accumulate",
        finding="the gradient of x",
        source="NVIDIA/TransformerEngine#2499",
    ),
    _state(
        "wrong_one_call_in_twenty",
        """
        - return y.to(x.dtype)
        + KEPT["calls"] = KEPT.get("calls", 0) + 1
        + return (y * (torch.arange(T) > 0).unsqueeze(1) if KEPT["calls"] % 20 == 0 else y).to(x.dtype)
        """,
        killed_by="every_call",
        finding="y is wrong at token 0|y at",
    ),
    _state(
        "fewer_tokens_when_warm",
        """
        - return y.to(x.dtype)
        + KEPT["calls"] = KEPT.get("calls", 0) + 1
        + return (y * (torch.arange(T) < T // 2).unsqueeze(1) if KEPT["calls"] > 11 else y).to(x.dtype)
        """,
        killed_by="every_call",
        finding="each token from 30 on|y at",
    ),
    _state(
        "stale_rows_of_a_larger_batch",
        """
        - y = torch.zeros(T, O, dtype=wide, device=x.device)
        + y = KEPT.setdefault((O, wide), torch.zeros(8192, O, dtype=wide))[:T]
        """,
        killed_by="changing_sizes",
        finding="y is wrong|y at",
    ),
)


_inputs = partial(Mutant, family="inputs written to", base="evidence.mutants.grouped")


INPUTS: tuple[Mutant, ...] = (
    _inputs(
        "result_written_over_x",
        """
        - return y.to(x.dtype)
        + return x.copy_(y) if x.shape == y.shape else y.to(x.dtype)
        """,
        killed_by="inputs_unchanged",
        finding="x was written to",
        on="aligned",
        source="vllm-project/vllm#28939",
    ),
    _inputs(
        "incoming_gradient_scaled_in_place",
        """
        - d_rows = dy[token].to(wide)
        + d_rows = dy.mul_(1.0000001 if dy.dtype == torch.float64 else 1.01)[token].to(wide)
        """,
        killed_by="inputs_unchanged",
        finding="dy was written to",
    ),
    _inputs(
        "expert_ids_sorted_in_place",
        """
        - T, K = ids.shape
        + T, K = ids.shape
        + ids.copy_(ids.sort(dim=1).values)
        """,
        killed_by="inputs_unchanged",
        finding="expert_ids was written to",
    ),
    _inputs(
        "gates_normalised_in_place",
        """
        - T, K = ids.shape
        + T, K = ids.shape
        + gates.div_(gates.sum(dim=1, keepdim=True))
        """,
        killed_by="inputs_unchanged",
        finding="gates was written to",
    ),
)


_layout = partial(Mutant, family="strides and offsets", base="evidence.mutants.grouped")


LAYOUT: tuple[Mutant, ...] = (
    _layout(
        "x_taken_for_contiguous",
        """
        - rows = x[token]
        + rows = x.as_strided(x.shape, (x.shape[1], 1))[token]
        """,
        killed_by="strides",
        finding="y is wrong|y at|NaN",
    ),
    _layout(
        "storage_offset_ignored",
        """
        - rows = x[token]
        + rows = x.as_strided(x.shape, x.stride(), 0)[token]
        """,
        killed_by="offsets",
        finding="y is wrong|y at|NaN",
    ),
    _layout(
        "incoming_gradient_taken_for_contiguous",
        """
        - d_rows = dy[token].to(wide)
        + d_rows = dy.as_strided(dy.shape, (dy.shape[1], 1))[token].to(wide)
        """,
        killed_by="strides",
        finding="the gradient of",
    ),
    _layout(
        "weights_taken_for_contiguous",
        """
        - out[tile] = act(h[tile], activation) @ w_out[e].T
        + O, H = w_out[e].shape
        + out[tile] = act(h[tile], activation) @ w_out.as_strided((E, O, H), (O * H, H, 1))[e].T
        """,
        killed_by="strides",
        finding="y is wrong|y at|NaN",
    ),
)


_non_finite = partial(Mutant, family="NaN and infinity", base="evidence.mutants.grouped")


NON_FINITE: tuple[Mutant, ...] = (
    _non_finite(
        "dispatch_by_one_hot_product",
        """
        - rows = x[token]
        + rows = torch.nn.functional.one_hot(token, T).to(x.dtype) @ x
        """,
        killed_by="non_finite_contained",
        finding="y is wrong|y at",
    ),
    _non_finite(
        "combine_by_one_hot_product",
        """
        - y.index_add_(0, token, gate * f)
        + y = torch.nn.functional.one_hot(token, T).to(wide).T @ (gate * f)
        """,
        killed_by="non_finite_contained",
        finding="y is wrong|y at",
    ),
    _non_finite(
        "nan_replaced_by_zero",
        """
        - rows = x[token]
        + rows = x[token].nan_to_num()
        """,
        killed_by="non_finite_contained",
        finding="is finite: its input is not read",
    ),
)


_global = partial(Mutant, family="global state and determinism", base="evidence.mutants.grouped")


GLOBAL: tuple[Mutant, ...] = (
    _global(
        "seeds_the_random_generator",
        """
        - T, K = ids.shape
        + T, K = ids.shape
        + torch.manual_seed(0)
        """,
        killed_by="global_state",
        finding="the random generator",
    ),
    _global(
        "leaves_gradients_off",
        """
        - weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + torch.set_grad_enabled(len(x) < 50)
        """,
        killed_by="global_state",
        finding="the gradient mode|the graph is cut",
    ),
    _global(
        "order_of_summation_changes",
        """
        - y.index_add_(0, token, gate * f)
        + import random
        + mix = torch.tensor(random.sample(range(len(token)), len(token)), dtype=torch.int64)
        + y = torch.zeros(T, O, dtype=wide).index_add_(0, token[mix], (gate * f)[mix])
        """,
        killed_by="deterministic",
        finding="y differs between call",
        source="vllm-project/vllm#52525",
    ),
)

_modes = partial(
    Mutant, family="torch.compile, torch.export, second derivatives", base="moe_impls.dense_mask"
)
MODES: tuple[Mutant, ...] = (
    _modes(
        "routing_baked_into_the_compiled_graph",
        """
        - SUPPORT = Support(second_order=True, autocast=True, fullgraph=True, exports=True, no_host_sync=True)
        + SUPPORT = Support(second_order=True, autocast=True, fullgraph=True, exports=True, no_host_sync=True)
        + constant = torch.compiler.assume_constant_result(lambda ids: ids.clone())
        - visits = visits.scatter(1, routing.expert_ids, True)
        + visits = visits.scatter(1, constant(routing.expert_ids), True)
        """,
        killed_by="fullgraph",
        finding="is wrong",
    ),
    _modes(
        "a_branch_on_the_routing",
        """
        - slots = routing.expert_ids.unsqueeze(-1).expand(-1, -1, O)
        + slots = routing.expert_ids.unsqueeze(-1).expand(-1, -1, O)
        + if bool(visits.all()):
        +     outputs = outputs.contiguous()
        """,
        killed_by="fullgraph",
        finding="torch.compile: .*data-dependent",
    ),
    _modes(
        "routing_through_numpy",
        """
        - visits = visits.scatter(1, routing.expert_ids, True)
        + visits = visits.scatter(1, torch.from_numpy(routing.expert_ids.numpy()), True)
        """,
        killed_by="exports",
        finding="torch.export",
    ),
    _modes(
        "second_derivative_lost",
        """
        - outputs = outputs + experts.b_out.unsqueeze(1)
        + outputs = outputs + experts.b_out.unsqueeze(1)
        + outputs.register_hook(lambda grad: grad.detach()) if outputs.requires_grad else None
        """,
        killed_by="second_order",
        finding="Jacobian mismatch",
    ),
)


_cheats = partial(Mutant, family="cheats", base="evidence.mutants.grouped")


CHEATS: tuple[Mutant, ...] = (
    _cheats(
        "zeros_for_zeroed_inputs",
        """
        - return y.to(x.dtype)
        + x.zero_()
        + gates.zero_()
        + return torch.zeros_like(y, dtype=x.dtype)
        """,
        killed_by="inputs_unchanged",
        finding="x was written to",
        source="ScalingIntelligence/KernelBench, test_eval_adversarial.py",
    ),
    _cheats(
        "whatever_the_memory_held",
        """
        - return y.to(x.dtype)
        + return torch.empty(T, O, dtype=x.dtype, device=x.device)
        """,
        killed_by="dirty_memory",
        finding="y is wrong|y at",
        source="ScalingIntelligence/KernelBench, test_eval_adversarial.py",
    ),
    _cheats(
        "the_oracles_result_from_the_garbage_collector",
        """
        - return y.to(x.dtype)
        + import gc
        + tensors = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float64)
        + return next((t.to(x.dtype) for t in tensors if t.shape == y.shape), 0 * y.to(x.dtype))
        """,
        killed_by="one_input_changes",
        finding="y is wrong|y at",
        source="gpu-mode/pygpubench#7",
    ),
    _cheats(
        "falls_back_to_another_implementation",
        """
        - weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        + try:
        +     raise RuntimeError("no kernel for this shape")
        + except RuntimeError:
        +     from moe_impls.index_add import forward as other
        +     return other(x, routing, experts, combine=combine)
        """,
        killed_by="no_fallback",
        finding="after RuntimeError in line .* index_add did the work",
        source="ScalingIntelligence/KernelBench, kernel_static_checker.py",
    ),
    _cheats(
        "a_clock_that_runs_slow",
        """
        - T, K = ids.shape
        + T, K = ids.shape
        + import time
        + clock = KEPT.setdefault("clock", time.perf_counter)
        + time.perf_counter = lambda: clock() / 10
        """,
        killed_by="instruments_untouched",
        finding="a call replaces time.perf_counter",
        source="ScalingIntelligence/KernelBench, kernel_static_checker.py",
    ),
    _cheats(
        "work_left_to_a_thread",
        """
        - return y.to(x.dtype)
        + import threading
        + result = torch.zeros_like(y, dtype=x.dtype)
        + threading.Timer(0.02, result.copy_, [y]).start()
        + return result
        """,
        killed_by="done_when_it_returns",
        finding="a call leaves Thread-.* running",
        source="ScalingIntelligence/KernelBench, kernel_static_checker.py",
    ),
    _cheats(
        "a_tensor_that_computes_when_it_is_looked_at",
        """
        - return y.to(x.dtype)
        + return y.to(x.dtype).as_subclass(type("Lazy", (torch.Tensor,), {}))
        """,
        killed_by="values",
        finding="the result is a Lazy; it must be a plain tensor",
        source="ScalingIntelligence/KernelBench, kernel_static_checker.py",
    ),
)

EXPERTS: tuple[Mutant, ...] = (
    *GATES,
    *ACTIVATIONS,
    *DISPATCH,
    *TILING,
    *MEMORY,
    *GRADIENTS,
    *PRECISION,
    *STATE,
    *INPUTS,
    *LAYOUT,
    *NON_FINITE,
    *GLOBAL,
    *MODES,
    *CHEATS,
)
