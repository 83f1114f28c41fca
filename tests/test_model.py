"""The transformer's sites, AbsTopK, sinks and positions; small enough to work out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsetrain.config import RunConfig, load_config
from sparsetrain.model import BLOCK_SITES, Transformer, site_widths

SMALL = ["model.n_layers=2", "model.d_model=16", "model.d_head=4", "model.n_ctx=12"]


def build(*overrides, vocab_size=20, dtype=torch.float32) -> Transformer:
    options = load_config(RunConfig, [*SMALL, "sparsity.density=1", *overrides]).model
    model = Transformer(options, vocab_size, torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():  # weights of size 1, so that every part matters
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.5)
    return model


def tokens(n=12):
    return torch.randint(20, (3, n), generator=torch.Generator().manual_seed(1))


def masked_attention(q, k, v, sink, causal=True):
    """Attention written out, for (B, H, T, K)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def reference_forward(m: Transformer, x: torch.Tensor) -> torch.Tensor:
    """The paper's forward pass (digest 1.2), written plainly and apart from the model's code."""

    def topk(t, fraction):
        k = int(fraction * t.shape[-1])
        kept = t.abs().topk(k, -1).indices
        return torch.zeros_like(t).scatter(-1, kept, t.gather(-1, kept))

    def normed(t, norm):
        if m.options.norm == "none":
            return t
        if m.options.norm == "layer":
            centred = t - t.mean(-1, keepdim=True)
            return centred / (t.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
        return t / (t.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    f = m.options.abs_topk
    h = m.embed.weight[x]
    p = None
    if m.options.positions == "learned":
        h = h + m.positions.weight[: x.shape[1]]
    elif m.options.positions == "concat":
        p = m.positions.weight[: x.shape[1]].expand(x.shape[0], -1, -1)
    for b in m.blocks:
        a = normed(h, b.attn.norm.resid)
        a = a if p is None else torch.cat([a, normed(p, b.attn.norm.pos)], -1)
        qkv = topk(a, f.attn_in) @ b.attn.qkv.weight.t() + b.attn.qkv.bias
        q, k, v = (topk(t, s) for t, s in zip(qkv.chunk(3, -1), (f.q, f.k, f.v), strict=True))
        q, k, v = (t.view(*t.shape[:2], -1, m.options.d_head).transpose(1, 2) for t in (q, k, v))
        z = masked_attention(q, k, v, b.attn.sink, m.options.causal).transpose(1, 2).flatten(2)
        h = h + topk(z @ b.attn.out.weight.t() + b.attn.out.bias, f.attn_out)
        a = normed(h, b.mlp.norm.resid)
        a = a if p is None else torch.cat([a, normed(p, b.mlp.norm.pos)], -1)
        n = topk(a, f.mlp_in) @ b.mlp.up.weight.t() + b.mlp.up.bias
        activation = {"gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
        n = topk(activation[m.options.activation](n), f.mlp_act)
        h = h + topk(n @ b.mlp.out.weight.t() + b.mlp.out.bias, f.mlp_out)
    logits = normed(h, m.norm) @ m.unembed.weight.t()
    return logits + m.bigram[x] if m.options.bigram else logits


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.sink=false", "model.bigram=false", "model.activation=relu"),
        ("model.positions=learned",),
        ("model.positions=concat", "model.d_pos=4"),
        ("model.norm=layer", "model.activation=gelu_tanh", "model.positions=concat", "model.d_pos=4"),
        ("model.norm=none", "model.causal=false"),
        ("model.abs_topk.q=0.5", "model.abs_topk.mlp_act=0.1", "model.abs_topk.attn_out=0.9"),
    ],
)
def test_the_forward_pass_equals_the_papers(overrides):
    model = build(*overrides, dtype=torch.float64)
    torch.testing.assert_close(model(tokens()), reference_forward(model, tokens()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("overrides", [(), ("model.bigram=false",), ("model.positions=concat", "model.d_pos=4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients(overrides, dtype):
    model, targets = build(*overrides, dtype=dtype), tokens().flip(1)
    ours, theirs = model.loss(tokens(), targets), F.cross_entropy(model(tokens()).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_biases_the_model_has_none():
    assert not any("bias" in name for name, _ in build("model.bias=false").named_parameters())


def test_future_tokens_change_nothing_before_them():
    model = build("model.positions=learned")
    x, changed = tokens(), tokens()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    torch.testing.assert_close(model(x)[:, :7], model(changed)[:, :7], rtol=0, atol=1e-6)


def test_every_site_is_read_in_its_width_and_keeps_its_share():
    model = build("model.positions=concat", "model.d_pos=4")
    widths = site_widths(model.options)
    assert len(widths) == 2 + 2 * len(BLOCK_SITES)
    logits, seen = model.run(tokens(), read=widths)
    assert torch.equal(logits, model(tokens()))
    assert {s: x.shape[-1] for s, x in seen.items()} == widths
    assert list(seen) == list(widths), "sites are listed in forward order"
    for site in ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out"):
        kept = (seen[f"blocks.1.{site}"] != 0).sum(-1)
        assert (kept == widths[f"blocks.1.{site}"] // 4).all(), site


def test_residual_sites_add_up():
    _, s = build().run(tokens(), read=site_widths(build().options))
    for l in range(2):
        b = f"blocks.{l}."
        assert torch.equal(s[b + "resid_mid"], s[b + "resid_pre"] + s[b + "attn_out"])
        assert torch.equal(s[b + "resid_post"], s[b + "resid_mid"] + s[b + "mlp_out"])
    assert torch.equal(s["final_resid"], s["blocks.1.resid_post"])


def test_an_edit_replaces_what_follows_and_what_is_read():
    model = build()
    logits, seen = model.run(tokens(), read=["blocks.0.v"], edits={"blocks.0.v": torch.zeros_like})
    assert not seen["blocks.0.v"].any()
    bias_only = model.blocks[0].attn.out.bias
    _, out = model.run(tokens(), read=["blocks.0.attn_out"], edits={"blocks.0.v": torch.zeros_like})
    kept = bias_only.abs().topk(4).indices
    assert set(out["blocks.0.attn_out"][0, 0].nonzero().flatten().tolist()) == set(kept.tolist())
    assert not torch.equal(logits, model(tokens()))
    assert torch.equal(model(tokens()), build()(tokens())), "no edit outlives its call"


def test_an_unknown_site_is_refused_by_name():
    with pytest.raises(ValueError, match="sites must be among embed, .*; got blocks.9.q"):
        build().run(tokens(), read=["blocks.9.q"])


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = build().train()
        model.checkpoint_activations = checkpointed
        model(tokens()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_weights_follow_the_seed_and_gpt2s_rule():
    options = load_config(RunConfig, ["model.d_model=256", "model.n_layers=2"]).model
    a, b = (Transformer(options, 50, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert a.blocks[0].mlp.out.weight.std().item() == pytest.approx(0.02 / 2, rel=0.02)
    assert not a.blocks[0].mlp.up.bias.any()


def test_a_bfloat16_model_agrees_with_the_plain_one():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens())
    # AbsTopK may choose other entries after rounding, so only most logits need be near.
    near = (low.float() - model(tokens())).abs() < 0.25
    assert near.float().mean() > 0.8
