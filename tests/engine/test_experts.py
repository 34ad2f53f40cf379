"""The dropless experts against a per-token loop, stock implementations, and calculus."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_routing.engine import experts as implementation
from moe_routing.engine.context import ForwardContext, forward_context
from moe_routing.errors import InputError

E, H, I = 64, 16, 8  # noqa: E741 (shape letters)
KERNELS = ("grouped", "grouped_tiled", "loop_tiled", "dense")


def run(kernel, module, hidden, index, weight):
    """Compute with a given kernel, whichever would be selected."""
    pairs = implementation.select_pairs(index, weight, module.num_experts)
    weights = implementation.right_hand_weights(module, [module.gate_up_proj, module.down_proj])
    return getattr(implementation, f"_{kernel}")(module, hidden, pairs, weights)


def make_experts(dtype=torch.float32, name="dropless", num_experts=E):
    config = OlmoeConfig(
        hidden_size=H, intermediate_size=I, num_experts=num_experts, num_experts_per_tok=1
    )
    config._experts_implementation = name
    module = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return module.to(dtype).requires_grad_(False)


def make_routing(tokens, k, seed=0, drop=0.0, num_experts=E):
    """Distinct experts per token, some slots padded, padded ones last, as strategies make them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator)
    index = torch.rand(tokens, num_experts, generator=generator).topk(k, dim=1).indices
    keep = torch.rand(tokens, k, generator=generator) >= drop
    index = index.masked_fill(~keep, num_experts).sort(dim=1).values
    weight = torch.rand(tokens, k, generator=generator).masked_fill(index == num_experts, 0.0)
    return hidden, index, weight


def loop(module, hidden, index, weight):
    """Token by token, slot by slot."""
    out = torch.zeros_like(hidden)
    for token, (experts, weights) in enumerate(zip(index.tolist(), weight, strict=True)):
        for expert, w in zip(experts, weights, strict=True):
            if expert == module.num_experts:
                continue
            gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            out[token] += w * (module.down_proj[expert] @ inner)
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("tokens", "k", "drop"), [(1, 1, 0), (7, 3, 0.5), (40, 8, 0), (9, 64, 0.2)]
)
def test_every_kernel_is_the_loop(kernel, tokens, k, drop):
    module = make_experts()
    hidden, index, weight = make_routing(tokens, k, drop=drop)
    out = run(kernel, module, hidden, index, weight)
    torch.testing.assert_close(out, loop(module, hidden, index, weight), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 300),
    k=st.integers(1, E),
    drop=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_kernels_agree_with_eager_for_any_number_of_experts(tokens, k, drop, seed):
    module = make_experts()
    hidden, index, weight = make_routing(tokens, k, seed, drop)
    stock = make_experts(name="eager")(hidden, index, weight)
    for kernel in KERNELS:
        out = run(kernel, module, hidden, index, weight)
        torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm", "dropless"])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_every_implementation_of_transformers(name, drop):
    module = make_experts(name=name)
    hidden, index, weight = make_routing(30, 8, drop=drop)
    reference = loop(module, hidden, index, weight)
    if name in ("grouped_mm", "batched_mm"):
        # They misread the id E: padded slots get a valid id, and count by their weight 0 only.
        index = index.where(index < E, 0)
    out = module(hidden, index, weight)
    assert out.isfinite().all()
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)


def test_no_tokens_at_all():
    out = make_experts()(*make_routing(0, 4))
    assert out.shape == (0, H)


@pytest.mark.parametrize("tokens", [1, 400])
def test_tokens_without_experts_get_zero(tokens):
    module = make_experts()
    hidden, index, weight = make_routing(tokens, 4, drop=1.0)
    assert (module(hidden, index, weight) == 0).all()
    index[0, 0], weight[0, 0] = 5, 0.5
    out = module(hidden, index, weight)
    assert out[0].abs().sum() > 0
    assert (out[1:] == 0).all()


@pytest.mark.parametrize("kernel", ["grouped", "grouped_tiled", "loop_tiled"])
def test_experts_that_nobody_selects_are_not_read(kernel):
    module = make_experts()
    hidden, index, weight = make_routing(300, 4, drop=0.3)
    index = index.where(index < 50, E)
    weight = weight.where(index < E, torch.nan)  # nor is the weight of a padded slot
    module.gate_up_proj[50:] = torch.nan
    module.down_proj[50:] = torch.nan
    out = run(kernel, module, hidden, index, weight)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "k"), [(20, 8), (40, 64)])
def test_half_precisions(dtype, tokens, k):
    module = make_experts(dtype)
    hidden, index, weight = make_routing(tokens, k, drop=0.2)
    hidden = hidden.to(dtype)
    out = module(hidden, index, weight.to(dtype))
    assert out.dtype == dtype
    reference = loop(module.float(), hidden.float(), index, weight.to(dtype).float())
    error = (out.float() - reference).norm() / reference.norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_gradients(drop):
    module = make_experts(torch.float64, num_experts=5)
    hidden, index, weight = make_routing(6, 3, drop=drop, num_experts=5)
    inputs = [hidden.double(), weight.double(), module.gate_up_proj.data, module.down_proj.data]
    inputs = [value.clone().requires_grad_(True) for value in inputs]

    def forward(hidden, weight, up, down):
        weights = {"gate_up_proj": up, "down_proj": down}
        return torch.func.functional_call(module, weights, (hidden, index, weight))

    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_single_precision_gradients_are_those_of_eager(drop):
    hidden, index, weight = make_routing(200, 8, drop=drop)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    gradients = {}
    for name in ("dropless", "eager"):
        module = make_experts(name=name).requires_grad_(True)
        inputs = [hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
        out = module(inputs[0], index, inputs[1])
        gradients[name] = torch.autograd.grad(
            (out * direction).sum(), [*inputs, module.gate_up_proj, module.down_proj]
        )
    for found, expected in zip(gradients["dropless"], gradients["eager"], strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_weights_have_gradients_where_nothing_else_has():
    module = make_experts()
    hidden, index, weight = make_routing(50, 8, drop=0.3)
    gradients = []
    for compute in (module, lambda *arguments: loop(module, *arguments)):
        leaf = weight.clone().requires_grad_(True)
        gradients += torch.autograd.grad(compute(hidden, index, leaf).square().sum(), leaf)
    assert gradients[1].abs().max() > 1
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_autocast_computes_in_half_precision_and_gives_back_the_hidden_states_dtype():
    module = make_experts().requires_grad_(True)
    hidden, index, weight = make_routing(50, 8, drop=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(hidden, index, weight)
        out.sum().backward()
    half = make_experts(torch.bfloat16)(hidden.bfloat16(), index, weight)
    assert out.dtype == module.down_proj.grad.dtype == torch.float32
    assert torch.equal(out, half.float())


def test_rows_that_do_not_fill_sixteen_bytes():
    config = OlmoeConfig(hidden_size=9, intermediate_size=3, num_experts=E)
    config._experts_implementation = "dropless"
    module = OlmoeExperts(config)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    _, index, weight = make_routing(20, 4, drop=0.3)
    hidden = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    out = module(hidden, index, weight)
    torch.testing.assert_close(out, loop(module, hidden, index, weight), rtol=1e-4, atol=1e-5)


def test_summing_a_few_tokens_at_a_time_does_not_change_the_sum(monkeypatch):
    module = make_experts(torch.bfloat16)
    hidden, index, weight = make_routing(50, 8, drop=0.2)
    whole = module(hidden.bfloat16(), index, weight)
    monkeypatch.setattr(implementation, "GATHER_NUMBERS", 3 * 8 * H)
    assert torch.equal(module(hidden.bfloat16(), index, weight), whole)


def test_inference_and_training_agree():
    module = make_experts()
    hidden, index, weight = make_routing(800, 24, drop=0.1)
    fast = module(hidden, index, weight)
    slow = module(hidden.requires_grad_(True), index, weight)
    assert slow.requires_grad
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "k", "grad", "plain", "onednn"),
    [
        (16, 8, False, "_grouped_tiled", "_grouped_tiled"),
        (1024, 8, False, "_grouped_tiled", "_grouped_tiled"),
        (2048, 8, False, "_grouped_tiled", "_loop_tiled"),
        (2048, 8, True, "_grouped", "_grouped"),
        (1024, 48, False, "_dense", "_dense"),
        (16, 64, False, "_grouped_tiled", "_grouped_tiled"),
    ],
)
def test_the_kernel_follows_work_and_processor(monkeypatch, tokens, k, grad, plain, onednn):
    hidden = torch.zeros(tokens, H, requires_grad=grad)
    for preferred, kernel in ((False, plain), (True, onednn)):
        monkeypatch.setattr(implementation, "prefers_onednn", lambda preferred=preferred: preferred)
        chosen = implementation.select_kernel(make_experts(), hidden, tokens * k)
        assert chosen is getattr(implementation, kernel)


@pytest.mark.parametrize(("tokens", "kernel"), [(2048, "_grouped_tiled"), (4096, "_loop_tiled")])
def test_the_kernel_of_concurrent_batches(monkeypatch, tokens, kernel):
    """The loop over experts holds the GIL, for which concurrent batches wait."""
    monkeypatch.setattr(implementation, "prefers_onednn", lambda: True)
    arguments = make_experts(), torch.zeros(tokens, H), tokens * 8
    with forward_context(ForwardContext(concurrent=True)):
        chosen = implementation.select_kernel(*arguments)
    assert chosen is getattr(implementation, kernel)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_rows_filled_up_for_onednn_do_not_change_the_sum(monkeypatch, drop):
    module, (hidden, index, weight) = make_experts(), make_routing(300, 8, drop=drop)
    sizes = []

    def spy(rows, weight):
        sizes.append(len(rows))
        return rows @ weight.t()

    monkeypatch.setattr(implementation, "linear", spy)
    with torch.no_grad():
        filled = run("loop_tiled", module, hidden, index, weight)
    assert sizes
    assert {size % implementation.ROWS_STEP for size in sizes} == {0}
    torch.testing.assert_close(filled, loop(module, hidden, index, weight))


@pytest.mark.parametrize("kernel", ["grouped", "loop"])
@pytest.mark.parametrize("drop", [0.2, 1.0])
def test_tiles_do_not_change_the_sum(kernel, drop):
    """Tiles whose tokens select nothing among them."""
    module = make_experts()
    hidden, index, weight = make_routing(333, 8, drop=drop)
    index[:150], weight[:150] = E, 0.0
    sizes = []

    def rows(module, hidden, token, count, weights):
        sizes.append(token.numel())
        assert count.sum() == token.numel()
        return getattr(implementation, f"_{kernel}_rows")(module, hidden, token, count, weights)

    pairs = implementation.select_pairs(index, weight, E)
    compute = implementation._tiled(rows, implementation.Tile(4 * H * 300, 1))
    out = compute(
        module,
        hidden,
        pairs,
        implementation.right_hand_weights(module, [module.gate_up_proj, module.down_proj]),
    )
    assert len(sizes) == max(1, -(-pairs.expert_P.numel() // 300))
    assert sum(sizes) == pairs.expert_P.numel()
    whole = run("grouped", module, hidden, index, weight)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)


def test_compiled_graphs_leave_the_experts_out():
    module = make_experts()
    hidden, index, weight = make_routing(500, 8, drop=0.2)
    compiled = torch.compile(lambda h, i, w: module(2 * h, i, w) + 1, backend="eager")
    expected = module(2 * hidden, index, weight) + 1
    assert torch.equal(compiled(hidden, index, weight), expected)


def test_transposed_weights():
    module = make_experts()
    hidden, index, weight = make_routing(500, 8)
    expected = module(hidden, index, weight)
    module.is_transposed = True
    module.gate_up_proj.data = module.gate_up_proj.data.transpose(1, 2).contiguous()
    module.down_proj.data = module.down_proj.data.transpose(1, 2).contiguous()
    for kernel in KERNELS:
        out = run(kernel, module, hidden, index, weight)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gate_of_the_class_s_own_is_used(kernel):
    class OwnGate(OlmoeExperts):
        def _apply_gate(self, inner):
            gate, up = inner.chunk(2, dim=-1)
            return torch.sigmoid(gate) * (up + 1)

    module = make_experts()
    hidden, index, weight = make_routing(300, 8)
    stock = run(kernel, module, hidden, index, weight)
    module.__class__ = OwnGate
    inner = [(module.gate_up_proj[e] @ hidden.T).T for e in range(E)]
    rows = torch.stack([OwnGate._apply_gate(module, x) for x in inner], 1)
    rows = torch.einsum("tei,ehi->teh", rows, module.down_proj)
    weights = torch.zeros(300, E).scatter(1, index, weight)
    expected = torch.einsum("te,teh->th", weights, rows)
    out = run(kernel, module, hidden, index, weight)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (out - stock).abs().max() > 0.1


def test_unsupported_experts_are_refused():
    module = make_experts()
    module.has_post_expert_norm = True
    with pytest.raises(InputError, match="OlmoeExperts"):
        module(*make_routing(4, 2))
