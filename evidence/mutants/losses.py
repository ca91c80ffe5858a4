"""Wrong balance losses, loads and noisy gating."""

from __future__ import annotations

from functools import partial

from evidence.mutants.mutant import Mutant

_variation = partial(Mutant, family="coefficient of variation", base="moe_impls.losses")
VARIATION: tuple[Mutant, ...] = (
    _variation(
        "by_the_standard_deviation",
        """
        - return v.var(correction=0 if population else 1) / (v.mean().square() + CV_EPSILON)
        + return v.var(correction=0 if population else 1).sqrt() ** 2 / (v.mean().square() + CV_EPSILON)
        """,
        killed_by="cv_squared_gradients",
        finding=r"the gradient of cv_squared\(\[3",
        source="google-research/vmoe#218",
    ),
    _variation(
        "population_variance_always",
        """
        - return v.var(correction=0 if population else 1) / (v.mean().square() + CV_EPSILON)
        + return v.var(correction=0) / (v.mean().square() + CV_EPSILON)
        """,
        killed_by="cv_squared_values",
        finding="cv_squared",
    ),
    _variation(
        "mean_not_squared",
        """
        - return v.var(correction=0 if population else 1) / (v.mean().square() + CV_EPSILON)
        + return v.var(correction=0 if population else 1) / (v.mean() + CV_EPSILON)
        """,
        killed_by="cv_squared_values",
        finding="cv_squared",
    ),
    _variation(
        "nan_for_one_expert",
        """
        - if len(v) == 1:
        + if False:
        """,
        killed_by="cv_squared_values",
        finding=r"cv_squared\(\[7.0\]",
    ),
    _variation(
        "nan_for_no_tokens",
        """
        - return v.var(correction=0 if population else 1) / (v.mean().square() + CV_EPSILON)
        + return v.var(correction=0 if population else 1) / v.mean().square()
        """,
        killed_by="cv_squared_values",
        finding="cv_squared",
    ),
    _variation(
        "counts_in_the_dtype_given",
        """
        - v = v.to(accumulation_dtype(v.dtype))
        + v = v if v.is_floating_point() else v.float()
        """,
        killed_by="cv_squared_values",
        finding="cv_squared in bfloat16",
        source="NVIDIA/Megatron-LM#7081",
    ),
    _variation(
        "load_left_out",
        """
        - balance = cv_squared(importance, population=population) + cv_squared(load, population=population)
        + balance = cv_squared(importance, population=population)
        """,
        killed_by="auxiliary_loss_values",
        finding="auxiliary_loss",
    ),
    _variation(
        "coefficient_applied_twice",
        """
        - return loss_coef * balance
        + return loss_coef * loss_coef * balance
        """,
        killed_by="auxiliary_loss_values",
        finding="auxiliary_loss",
    ),
    _variation(
        "loss_added_twice",
        """
        - return loss_coef * balance
        + return loss_coef * (balance + balance)
        """,
        killed_by="auxiliary_loss_values",
        finding="auxiliary_loss",
        source="huggingface/trl#4070",
    ),
    _variation(
        "loss_without_a_gradient",
        """
        - return loss_coef * balance
        + return loss_coef * balance.detach()
        """,
        killed_by="auxiliary_loss_values",
        finding="(does not|not) require|grad",
        source="NVIDIA-NeMo/Automodel#1408",
    ),
)

_balancing = partial(Mutant, family="load-balancing loss", base="moe_impls.losses")
BALANCING: tuple[Mutant, ...] = (
    _balancing(
        "softmax_of_a_softmax",
        """
        - P = (weight.unsqueeze(1) * logits.softmax(dim=1)).sum(dim=0) / tokens
        + P = (weight.unsqueeze(1) * logits.softmax(dim=1).softmax(dim=1)).sum(dim=0) / tokens
        """,
        killed_by="load_balancing_values",
        finding="the loss for K",
        source="huggingface/transformers#45131",
    ),
    _balancing(
        "probabilities_of_the_chosen_only",
        """
        - P = (weight.unsqueeze(1) * logits.softmax(dim=1)).sum(dim=0) / tokens
        + logits = logits.masked_fill(visits == 0, -1e9)
        + P = (weight.unsqueeze(1) * logits.softmax(dim=1)).sum(dim=0) / tokens
        """,
        killed_by="load_balancing_values",
        finding="the loss for K",
        source="AI-Hypercomputer/maxtext#1433",
    ),
    _balancing(
        "padding_counted",
        """
        - f = (weight.unsqueeze(1) * visits).sum(dim=0) / (tokens * expert_ids.shape[1])
        + f = visits.sum(dim=0) / (tokens * expert_ids.shape[1])
        """,
        killed_by="load_balancing_values",
        finding="the masked loss",
        source="huggingface/transformers#28505",
    ),
    _balancing(
        "first_choice_only",
        """
        - visits = torch.zeros_like(logits).scatter(1, expert_ids, 1.0)
        + visits = torch.zeros_like(logits).scatter(1, expert_ids[:, :1], 1.0)
        """,
        killed_by="load_balancing_values",
        finding="the loss for K = 2",
        source="deepspeedai/DeepSpeed#2551",
    ),
    _balancing(
        "choices_missing_in_the_denominator",
        """
        - f = (weight.unsqueeze(1) * visits).sum(dim=0) / (tokens * expert_ids.shape[1])
        + f = (weight.unsqueeze(1) * visits).sum(dim=0) / tokens
        """,
        killed_by="load_balancing_values",
        finding="the loss for K = 2",
        source="huggingface/transformers#33639",
    ),
    _balancing(
        "number_of_experts_left_out",
        """
        - return E * (f * P).sum()
        + return (f * P).sum()
        """,
        killed_by="load_balancing_values",
        finding="the loss for K = 1",
    ),
    _balancing(
        "no_gradient",
        """
        - P = (weight.unsqueeze(1) * logits.softmax(dim=1)).sum(dim=0) / tokens
        + P = (weight.unsqueeze(1) * logits.detach().softmax(dim=1)).sum(dim=0) / tokens
        """,
        killed_by="load_balancing_values",
        finding="grad",
    ),
    _balancing(
        "padding_multiplied_by_zero",
        """
        - return logits.masked_fill(~mask.unsqueeze(1), 0), mask.to(logits.dtype)
        + return logits, mask.to(logits.dtype)
        """,
        killed_by="load_balancing_values",
        finding="with padding of nan",
        source="huggingface/transformers#29363",
    ),
)

_z_loss = partial(Mutant, family="z-loss", base="moe_impls.losses")
Z_LOSS: tuple[Mutant, ...] = (
    _z_loss(
        "without_a_shift",
        """
        - return (weight * logits.logsumexp(dim=1).square()).sum() / weight.sum().clamp(min=1)
        + return (weight * logits.exp().sum(dim=1).log().square()).sum() / weight.sum().clamp(min=1)
        """,
        killed_by="z_loss_values",
        finding="the loss of large logits",
        source="databricks/megablocks#133",
    ),
    _z_loss(
        "not_squared",
        """
        - return (weight * logits.logsumexp(dim=1).square()).sum() / weight.sum().clamp(min=1)
        + return (weight * logits.logsumexp(dim=1)).sum() / weight.sum().clamp(min=1)
        """,
        killed_by="z_loss_values",
        finding="the loss",
    ),
    _z_loss(
        "sum_instead_of_mean",
        """
        - return (weight * logits.logsumexp(dim=1).square()).sum() / weight.sum().clamp(min=1)
        + return (weight * logits.logsumexp(dim=1).square()).sum()
        """,
        killed_by="z_loss_values",
        finding="the loss",
    ),
    _z_loss(
        "padding_in_the_denominator",
        """
        - return (weight * logits.logsumexp(dim=1).square()).sum() / weight.sum().clamp(min=1)
        + return (weight * logits.logsumexp(dim=1).square()).mean()
        """,
        killed_by="z_loss_values",
        finding="the masked loss",
        source="huggingface/transformers#28505",
    ),
)

_loads = partial(Mutant, family="load, importance and noise", base="moe_impls.router")
LOADS: tuple[Mutant, ...] = (
    _loads(
        "uniform_noise",
        """
        - noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=dtype)
        + noise = torch.rand(clean.shape, generator=generator, device=clean.device, dtype=dtype)
        """,
        killed_by="gating_matches_redraws",
        finding="the load minus the count",
        source="the notebook: noise is uniform, the load assumes Normal noise",
    ),
    _loads(
        "noise_scaled_by_the_clean_logits",
        """
        - scale = F.softplus(raw_scale.to(dtype)) + noise_epsilon
        + scale = F.softplus(clean) + noise_epsilon
        """,
        killed_by="gating_matches_redraws",
        finding="Normal noise of the paper",
        source="yfzhang114/SliME#3",
    ),
    _loads(
        "threshold_always_the_kth",
        """
        - threshold = torch.where(among_top, top.values[:, k:], top.values[:, k - 1 : k])
        + threshold = top.values[:, k - 1 : k]
        """,
        killed_by="load_values",
        finding="the load for k",
    ),
    _loads(
        "threshold_always_the_one_after",
        """
        - threshold = torch.where(among_top, top.values[:, k:], top.values[:, k - 1 : k])
        + threshold = top.values[:, k:]
        """,
        killed_by="load_matches_redraws",
        finding="redraws, the load says",
    ),
    _loads(
        "load_of_the_noisy_logits",
        """
        - return torch.special.ndtr((clean - threshold) / scale).sum(dim=0)
        + return torch.special.ndtr((noisy - threshold) / scale).sum(dim=0)
        """,
        killed_by="load_values",
        finding="the load for k",
    ),
    _loads(
        "load_without_the_scale",
        """
        - return torch.special.ndtr((clean - threshold) / scale).sum(dim=0)
        + return torch.special.ndtr(clean - threshold).sum(dim=0)
        """,
        killed_by="load_matches_redraws",
        finding="redraws, the load says",
    ),
    _loads(
        "load_detached",
        """
        - return torch.special.ndtr((clean - threshold) / scale).sum(dim=0)
        + return torch.special.ndtr((clean.detach() - threshold) / scale).sum(dim=0)
        """,
        killed_by="load_gradients",
        finding="the (gradient of clean|load gives clean)",
    ),
    _loads(
        "load_counts_positive_gates",
        """
        - return sort_by_expert(routing.expert_ids, num_experts)[1]
        + counts = torch.zeros(num_experts, dtype=torch.int64)
        + return counts.index_add(0, routing.expert_ids.flatten(), (routing.gates.flatten() > 0).long())
        """,
        killed_by="counts_visits",
        finding="the load",
        source="the notebook: a gate that underflows drops its expert",
    ),
    _loads(
        "importance_counts_visits",
        """
        - return dense_gates(routing._replace(gates=gates), num_experts).sum(dim=0)
        + return (dense_gates(routing._replace(gates=gates), num_experts) != 0).to(gates.dtype).sum(dim=0)
        """,
        killed_by="importance_values",
        finding="importance",
    ),
    _loads(
        "importance_in_bfloat16",
        """
        - gates = routing.gates.to(accumulation_dtype(routing.gates.dtype))
        + gates = routing.gates
        """,
        killed_by="importance_values",
        finding="importance of bfloat16 gates",
        source="NVIDIA/Megatron-LM#1482",
    ),
)

LOSSES: tuple[Mutant, ...] = (*VARIATION, *BALANCING, *Z_LOSS, *LOADS)
