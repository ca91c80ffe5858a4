"""Wrong routers: which experts are chosen, and what their gates are."""

from __future__ import annotations

from functools import partial

from evidence.mutants.mutant import Mutant

_scores = partial(Mutant, family="scores and renormalisation", base="moe_impls.router")
SCORES: tuple[Mutant, ...] = (
    _scores(
        "always_renormalised",
        """
        - if spec.score == "topk_softmax" or (spec.score == "softmax" and spec.renormalise):
        + if spec.score in ("softmax", "topk_softmax"):
        """,
        killed_by="values",
        finding="the gate of token",
        source="lablup/mlxcel#391",
    ),
    _scores(
        "never_renormalised",
        """
        - if spec.score == "topk_softmax" or (spec.score == "softmax" and spec.renormalise):
        + if spec.score == "topk_softmax":
        """,
        killed_by="values",
        finding="the gate of token",
        source="pytorch/torchtitan#1448",
    ),
    _scores(
        "raw_logits_where_not_renormalised",
        """
        - gates = scores.gather(1, expert_ids)
        + gates = z.gather(1, expert_ids)
        """,
        killed_by="values",
        finding="the gate of token",
        source="sgl-project/sglang#35160",
    ),
    _scores(
        "scaled_only_where_renormalised",
        """
        - return Routing(expert_ids, gates * spec.scale)
        + return Routing(expert_ids, gates * spec.scale if spec.renormalise else gates)
        """,
        killed_by="values",
        finding="the gate of token",
        source="sgl-project/sglang-jax#1282",
    ),
    _scores(
        "softmax_for_sigmoid",
        """
        - scores = z.sigmoid()
        + scores = z.softmax(dim=1)
        """,
        killed_by="values",
        finding="the gate of token",
    ),
    _scores(
        "softmax_over_the_tokens",
        """
        - gates = chosen.softmax(dim=1)
        + gates = chosen.softmax(dim=0)
        """,
        killed_by="values",
        finding="the gate of token",
        source="databricks/megablocks@04e4f1f",
    ),
    _scores(
        "selection_bias_in_the_gates",
        """
        - gates = scores.gather(1, expert_ids)
        + gates = (scores if selection_bias is None else scores + selection_bias).gather(1, expert_ids)
        """,
        killed_by="values",
        finding="the gate of token",
        source="vllm-project/vllm#12002",
    ),
    _scores(
        "score_recovered_by_subtracting_the_bias",
        """
        - gates = scores.gather(1, expert_ids)
        + bias = 0 * scores if selection_bias is None else selection_bias + 0 * scores
        + gates = ((scores + bias) - bias).gather(1, expert_ids)
        """,
        killed_by="values",
        finding="the gate of token",
        on="tiny_scores_large_bias",
        source="flashinfer-ai/flashinfer#3875",
    ),
    _scores(
        "wrong_gates_for_128_experts_and_8_choices",
        """
        - return Routing(expert_ids, gates * spec.scale)
        + gates = gates.softmax(dim=1) if (z.shape[1], spec.top_k) == (128, 8) else gates
        + return Routing(expert_ids, gates * spec.scale)
        """,
        killed_by="values",
        finding="the gate of token",
        on="qwen3_30b_a3b",
        source="MetaX-MACA/vLLM-metax#270",
    ),
    _scores(
        "softmax_without_a_shift",
        """
        - scores = z.softmax(dim=1)
        + scores = z.exp() / z.exp().sum(dim=1, keepdim=True)
        """,
        killed_by="large_logits",
        finding="gates holds nan",
    ),
    _scores(
        "epsilon_in_the_denominator",
        """
        - gates = F.logsigmoid(chosen).softmax(dim=1)
        + gates = chosen.sigmoid() / (chosen.sigmoid().sum(dim=1, keepdim=True) + 1e-3)
        """,
        killed_by="values",
        finding="the gate of token",
    ),
)

_choices = partial(Mutant, family="choice of experts", base="moe_impls.router")
CHOICES: tuple[Mutant, ...] = (
    _choices(
        "selection_bias_ignored",
        """
        - rank = z if selection_bias is None else scores
        + rank = z
        """,
        killed_by="values",
        finding="visits experts",
        on="deepseek_v3",
    ),
    _choices(
        "groups_ignored",
        """
        - if spec.groups == 1:
        + if True:
        """,
        killed_by="values",
        finding="more than 3 groups",
        on="deepseek_v2",
    ),
    _choices(
        "other_groups_masked_with_zero",
        """
        - best = rank.gather(1, members).topk(spec.top_k, dim=1).indices
        - return members.gather(1, best)
        + masked = torch.zeros_like(rank).scatter(1, members, rank.gather(1, members))
        + return masked.topk(spec.top_k, dim=1).indices
        """,
        killed_by="values",
        finding="groups of|visits experts",
        on="sigmoid_bias_negative",
        source="vllm-project/vllm#13474",
    ),
    _choices(
        "group_score_always_the_maximum",
        """
        - if spec.group_score == "max":
        + if True:
        """,
        killed_by="values",
        finding="visits experts",
        on="deepseek_v3",
        source="vllm-project/vllm#13474",
    ),
    _choices(
        "candidates_for_256_experts",
        """
        - check_logits(logits, spec, selection_bias)
        + check_logits(logits, spec, selection_bias)
        + logits = logits.masked_fill(torch.arange(logits.shape[1]) >= 256, -torch.inf)
        """,
        killed_by="values",
        finding="visits experts",
        on="qwen3_next",
        source="kekzl/imp#2056",
    ),
    _choices(
        "nan_row_visits_expert_0_only",
        """
        - expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = expert_ids.masked_fill(z.isnan().any(dim=1, keepdim=True), 0)
        """,
        killed_by="nan_contained",
        finding="must be distinct",
        source="vllm-project/vllm#39391",
    ),
    _choices(
        "equal_scores_choose_one_expert_twice",
        """
        - return rank.topk(spec.top_k, dim=1).indices
        + best = rank.topk(spec.top_k, dim=1)
        + equal = (best.values == best.values[:, :1]).all(dim=1, keepdim=True)
        + return torch.where(equal, best.indices[:, :1], best.indices)
        """,
        killed_by="ties",
        finding="must be distinct",
    ),
    _choices(
        "last_expert_out_of_range",
        """
        - expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias) + 1
        """,
        killed_by="values",
        finding="ids must be in|visits experts|RuntimeError|IndexError",
    ),
    _choices(
        "choice_in_bfloat16",
        """
        - expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = _select(z.detach().bfloat16(), scores.detach().bfloat16(), spec, selection_bias)
        """,
        killed_by="values",
        finding="visits experts",
        source="sgl-project/sglang#33764",
    ),
    _choices(
        "noise_in_evaluation_too",
        """
        - expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = _select(z.detach() + torch.randn_like(z), scores.detach(), spec, selection_bias)
        """,
        killed_by="values",
        finding="visits experts",
        source="deepspeedai/DeepSpeed#8620",
    ),
)

_router_gradients = partial(Mutant, family="router gradients", base="moe_impls.router")
ROUTER_GRADIENTS: tuple[Mutant, ...] = (
    _router_gradients(
        "gates_detached",
        """
        - return Routing(expert_ids, gates * spec.scale)
        + return Routing(expert_ids, gates.detach() * spec.scale)
        """,
        killed_by="gradients",
        finding="the graph is cut",
        source="KellerJordan/Muon#65",
    ),
    _router_gradients(
        "gradient_of_the_first_choice_only",
        """
        - return Routing(expert_ids, gates * spec.scale)
        + gates = torch.cat([gates[:, :1], gates[:, 1:].detach()], dim=1)
        + return Routing(expert_ids, gates * spec.scale)
        """,
        killed_by="gradients",
        finding="the gradient of logits",
        source="huggingface/transformers#48687",
    ),
    _router_gradients(
        "denominator_detached",
        """
        - gates = F.logsigmoid(chosen).softmax(dim=1)
        + gates = chosen.sigmoid() / chosen.sigmoid().sum(dim=1, keepdim=True).detach()
        """,
        killed_by="gradients",
        finding="the gradient of logits",
    ),
    _router_gradients(
        "graph_cut_without_tokens",
        """
        - check_logits(logits, spec, selection_bias)
        + check_logits(logits, spec, selection_bias)
        + logits = logits if len(logits) else logits.detach()
        """,
        killed_by="empty",
        finding="does not require a gradient",
        source="pytorch/torchtitan#1166",
    ),
)

_router_precision = partial(Mutant, family="router precision", base="moe_impls.router")
ROUTER_PRECISION: tuple[Mutant, ...] = (
    _router_precision(
        "logits_rounded_to_bfloat16",
        """
        - z = logits.to(accumulation_dtype(logits.dtype))
        + z = logits.bfloat16().to(accumulation_dtype(logits.dtype))
        """,
        killed_by="values",
        finding="the gate of token|visits experts",
        source="sgl-project/sglang#33764",
    ),
    _router_precision(
        "computed_in_the_dtype_of_the_logits",
        """
        - z = logits.to(accumulation_dtype(logits.dtype))
        + z = logits
        """,
        killed_by="values",
        finding="the gate of token|visits experts",
        on="float16",
    ),
    _router_precision(
        "float64_in_float32",
        """
        - z = logits.to(accumulation_dtype(logits.dtype))
        + z = logits.float()
        - return Routing(expert_ids, gates * spec.scale)
        + return Routing(expert_ids, (gates * spec.scale).to(accumulation_dtype(logits.dtype)))
        """,
        killed_by="values",
        finding="the gate of token",
        on="float64",
    ),
    _router_precision(
        "expert_ids_in_32_bits",
        """
        - return Routing(expert_ids, gates * spec.scale)
        + return Routing(expert_ids.int(), gates * spec.scale)
        """,
        killed_by="values",
        finding="expert_ids has dtype torch.int32",
    ),
)

_router_state = partial(Mutant, family="router state, inputs and modes", base="moe_impls.router")
ROUTER_STATE: tuple[Mutant, ...] = (
    _router_state(
        "logits_shifted_in_place",
        """
        - check_logits(logits, spec, selection_bias)
        + check_logits(logits, spec, selection_bias)
        + logits.data -= logits.amax(dim=1, keepdim=True)
        """,
        killed_by="inputs_unchanged",
        finding="logits was written to",
    ),
    _router_state(
        "choice_kept_by_address",
        """
        - expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)
        + expert_ids = KEPT.setdefault((logits.data_ptr(), logits.shape), expert_ids)
        """,
        killed_by="state",
        finding="in call 2: token",
    ),
    _router_state(
        "seeds_the_random_generator",
        """
        - check_logits(logits, spec, selection_bias)
        + check_logits(logits, spec, selection_bias)
        + torch.manual_seed(0)
        """,
        killed_by="global_state",
        finding="the random generator",
    ),
    _router_state(
        "half_precision_under_autocast",
        """
        - z = logits.to(accumulation_dtype(logits.dtype))
        + z = logits.to(accumulation_dtype(logits.dtype))
        + z = z.bfloat16().to(z.dtype) if torch.is_autocast_enabled("cpu") else z
        """,
        killed_by="modes",
        finding="the experts change under autocast|the gate of token",
    ),
    _router_state(
        "logits_shifted_by_the_batch",
        """
        - z = logits.to(accumulation_dtype(logits.dtype))
        + z = logits.to(accumulation_dtype(logits.dtype))
        + z = z + (z - z.mean(dim=0)) * (len(z) > 11)
        """,
        killed_by="tokens_apart",
        finding="depend on the other tokens|the gate of token",
    ),
)

ROUTERS: tuple[Mutant, ...] = (*SCORES, *CHOICES, *ROUTER_GRADIENTS, *ROUTER_PRECISION, *ROUTER_STATE)
