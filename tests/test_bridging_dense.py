"""Dense models for bridges: residuals as they are, sequences that enter halfway, and clear refusals."""

import logging
import re

import pytest
import torch
from dense_models import (
    FAMILIES,
    KINDS,
    LAYER_NORMS,
    PARALLEL,
    T,
    V,
    built,
    close,
    ours,
    random_tokens,
    theirs,
    transformers,
)
from tokenizers import Tokenizer

from sparsetrain.bridging.directions import read_norm
from sparsetrain.bridging.hf_hooks import change
from sparsetrain.bridging.hf_model import HfModel
from sparsetrain.bridging.residuals import BridgeError, hooked
from sparsetrain.data import train_tokenizer
from sparsetrain.kernels.reference import is_channel_major
from sparsetrain.linear import Linear


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["for x in y: pass\nwhile x: return True\n" * 9]), 280)


def spread(model, n_each=2, seed=2):
    """Entering rows in a mixed order, `n_each` at each site but one row more at the last, none at the second."""
    generator = torch.Generator().manual_seed(seed)
    counts = [0 if i == 1 else n_each for i in range(len(model.sites))]
    counts[-1] += 1
    rows = torch.randperm(sum(counts), generator=generator).split(counts)
    new = [torch.randn(n, T, model.width, generator=generator).requires_grad_() for n in counts]
    return dict(zip(model.sites, zip(rows, new, strict=True), strict=True))


def check_hybrid_pass(model):
    """Logits and gradients of a pass whose rows enter anywhere are those of whole passes, edited at each row's site."""
    entering = spread(model)
    tokens = random_tokens(sum(len(rows) for rows, _ in entering.values()))
    found = model.enter(tokens, entering)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((found * weights).sum(), [new for rows, new in entering.values() if len(rows)])
    gradients = iter(gradients)
    for site, (rows, new) in entering.items():
        if not len(rows):
            continue
        expected = model.steer(tokens[rows], {site: lambda x, new=new: new})
        close(found[rows], expected)
        close(next(gradients), torch.autograd.grad((expected * weights[rows]).sum(), new)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_those_of_transformers_but_never_the_normed_last(family):
    model, tokens = built(family), random_tokens(3)
    expected = model.model(tokens, output_hidden_states=True)
    found, logits = model.run(tokens)
    close(logits, expected.logits)
    for l, hidden in enumerate(expected.hidden_states[:-1]):
        close(found[f"blocks.{l}.resid_pre"], hidden)
    assert (found["final_resid"] - expected.hidden_states[-1]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_per_sublayer_or_per_block_as_the_log_says(family, tokenizer, caplog):
    with caplog.at_level(logging.INFO, "sparsetrain"):
        model = HfModel(theirs(family), tokenizer)
    parallel = family in PARALLEL
    n = len(model.blocks)
    assert len(model.sites) == (n + 1 if parallel else 2 * n + 1)
    assert ("at once" in caplog.text and f"a site per block: {n + 1}, not {2 * n + 1}" in caplog.text) == parallel
    assert ("its batch cannot grow" in caplog.text) == (family == "bloom")
    assert model.width == 32 and model.vocab_size == V


@pytest.mark.parametrize("family", [name for name in KINDS if name not in PARALLEL])
def test_what_is_between_attention_and_mlp_is_between_their_writes(family):
    """Without attention the residual does not change there; without the MLP it does not after it."""
    model = built(family)
    tokens = random_tokens(2)
    residuals, _ = model.run(tokens)
    pre, mid, post = (residuals[f"blocks.{x}"] for x in ("1.resid_pre", "1.resid_mid", "0.resid_pre"))
    assert (mid - pre).abs().max() > 1e-3 and (pre - post).abs().max() > 1e-3
    with hooked([change(model.blocks[0].write, torch.zeros_like)]):
        seen, _ = model.run(tokens)
    assert torch.equal(seen["blocks.0.resid_mid"], seen["blocks.0.resid_pre"])


@pytest.mark.parametrize("family", KINDS)
def test_each_row_of_a_hybrid_pass_is_a_pass_of_its_own(family):
    model = built(family)
    check_hybrid_pass(model)
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def test_a_batch_that_does_not_grow_gives_the_same(tokenizer):
    model = HfModel(theirs("llama"), tokenizer)
    assert model.grows
    entering = spread(model)
    tokens = random_tokens(sum(len(rows) for rows, _ in entering.values()))
    close(model._enter(tokens, entering, grows=False), model.enter(tokens, entering))
    model.grows = False
    check_hybrid_pass(model)


@pytest.mark.parametrize("family", KINDS)
def test_a_residual_replaced_by_itself_changes_nothing(family):
    model = built(family)
    tokens = random_tokens(2)
    residuals, logits = model.run(tokens, read=model.reads)
    rows = torch.arange(2)
    for site in model.sites:
        close(model.enter(tokens, {site: (rows, residuals[site])}), logits)
    for name in (*model.sites, *model.reads):
        close(model.steer(tokens, {name: lambda x: x * 1}), logits)
        assert (model.steer(tokens, {name: lambda x: x + 1 + 9 * x.roll(1, -1)}) - logits).abs().max() > 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_are_what_the_norms_make_of_the_sites(family):
    model = built(family)
    seen, _ = model.run(random_tokens(2), read=model.reads)
    for name in model.reads:
        site = name.replace("attn_in", "resid_pre").replace("mlp_in", "resid_mid").replace("final_in", "final_resid")
        site = site if site in seen else site.replace("resid_mid", "resid_pre")
        close(seen[name], model.normed(name, seen[site]))
        described = read_norm(model, name, seen[site].flatten(0, 1))  # refuses what is no norm of one scale per token
        assert described.centred == (family in LAYER_NORMS), (name, described)
    per_block = ["attn_in"] if family in ("phi", "stablelm-parallel", "falcon") else ["attn_in", "mlp_in"]
    n = len(model.blocks)
    assert model.reads == (*(f"blocks.{l}.{read}" for l in range(n) for read in per_block), "final_in")


def test_a_block_that_reads_once_says_so(tokenizer):
    model = HfModel(theirs("phi"), tokenizer)
    with pytest.raises(ValueError, match=r"got blocks.1.mlp_in; blocks.1 reads once for attention and MLP, as attn_in"):
        model.steer(random_tokens(1), {"blocks.1.mlp_in": lambda x: x})


def test_several_edits_at_once_are_made_in_order(tokenizer):
    """Each sees what the ones before it have changed: the residual is the sum of what was added on the way."""
    model = HfModel(theirs("gemma2"), tokenizer)
    tokens = random_tokens(2)
    seen = {}

    def note(name, change):
        def edit(x):
            seen[name] = x
            return x + change

        return edit

    edits = {"blocks.1.resid_pre": note("pre", 1.0), "blocks.1.resid_mid": note("mid", 2.0)}
    found = model.steer(tokens, edits)
    close(seen["pre"], model.run(tokens)[0]["blocks.1.resid_pre"])
    expected = model.steer(tokens, {"blocks.1.resid_mid": lambda x: seen["mid"] + 2.0})
    close(found, expected)
    assert (seen["mid"] - model.run(tokens)[0]["blocks.1.resid_mid"]).abs().max() > 0.5


OWN = {
    "sparse": {},
    "dense": {"bigram": False, "sink": False, "norm": "layer"},
    "learned-positions": {"positions": "learned"},
    "concatenated-positions": {"positions": "concat", "d_pos": 8},
}


@pytest.mark.parametrize("channel_major", [False, True], ids=["token-major", "channel-major"])
@pytest.mark.parametrize("shape", OWN)
def test_hybrid_passes_of_our_model(shape, channel_major, tokenizer):
    """Logits and gradients, of the parameters too, are those of whole passes, with sparse products or without."""
    model = ours(tokenizer, **OWN[shape])
    for module in model.model.modules():
        if isinstance(module, Linear) and channel_major:
            module.weight.data *= (module.weight > 0.1).float()
            module.read_(sparse=True)
    assert is_channel_major(model.run(random_tokens(2))[0]["blocks.1.resid_mid"]) == channel_major
    check_hybrid_pass(model)


def test_hybrid_passes_train_what_follows_their_site(tokenizer):
    model = ours(tokenizer)
    entering = spread(model)
    tokens = random_tokens(sum(len(rows) for rows, _ in entering.values()))
    model.enter(tokens, entering).square().sum().backward()
    found = {name: p.grad for name, p in model.model.named_parameters()}
    model.model.zero_grad()
    for site, (rows, new) in entering.items():
        if len(rows):
            model.steer(tokens[rows], {site: lambda x, new=new: new}).square().sum().backward()
    for name, p in model.model.named_parameters():
        if name == "embed.weight":
            assert found[name] is None and p.grad is None  # all rows enter behind it
        else:
            close(found[name], p.grad)


def test_no_row_of_our_model_is_computed_before_its_site(tokenizer):
    model = ours(tokenizer, n_layers=4)
    sizes = []
    model.model.blocks[2].mlp.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    entering = spread(model, n_each=3)
    n_before = sum(len(entering[s][0]) for s in model.sites[: model.sites.index("blocks.2.resid_mid") + 1])
    model.enter(random_tokens(sum(len(rows) for rows, _ in entering.values())), entering)
    assert sizes == [n_before]


def test_hybrid_passes_under_activation_checkpointing(tokenizer):
    model = ours(tokenizer)
    model.model.train().checkpoint_activations = True
    check_hybrid_pass(model)


def test_our_residuals_and_reads_are_the_models_own(tokenizer):
    model = ours(tokenizer, positions="concat", d_pos=8)
    tokens = random_tokens(2)
    seen, logits = model.run(tokens, read=model.reads)
    assert {*seen} == {*model.sites, *model.reads}
    assert torch.equal(logits, model.model(tokens))
    assert torch.equal(seen["final_in"], model.model.norm(seen["final_resid"]))
    assert torch.equal(seen["final_in"], model.normed("final_in", seen["final_resid"]))
    assert seen["blocks.0.attn_in"].shape == (2, T, 40)
    doubled = model.steer(tokens, {"final_in": lambda x: 2 * x})
    close(doubled, model.model.unembed(2 * seen["final_in"]) + model.model.bigram[tokens])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"blocks.0.resid_mid": [0, 1]}, "each of 3 rows must enter exactly once over all sites, got rows [0, 1]"),
        ({"blocks.0.resid_mid": [0, 1], "final_resid": [1, 2]}, "got rows [0, 1, 1, 2]"),
        ({}, "got rows []"),
        ({"blocks.9.resid_mid": [0, 1, 2]}, "sites must be among blocks.0.resid_pre, "),
    ],
    ids=["missing", "twice", "none", "unknown"],
)
def test_rows_that_do_not_enter_once_are_refused(rows, words, tokenizer):
    entering = {site: (torch.tensor(r), torch.zeros(len(r), T, 32)) for site, r in rows.items()}
    for model in (ours(tokenizer), HfModel(theirs("gpt2"), tokenizer)):
        with pytest.raises(ValueError, match=re.escape(words)):
            model.enter(random_tokens(3), entering)


def test_what_enters_must_fit(tokenizer):
    entering = {"final_resid": (torch.arange(3), torch.zeros(3, T, 31))}
    with pytest.raises(ValueError, match=r"enters at final_resid must have shape \(3, 10, 32\), got \(3, 10, 31\)"):
        ours(tokenizer).enter(random_tokens(3), entering)


class Leaky(torch.nn.Module):
    """A block that adds what it cannot know from the residual."""

    def __init__(self, block):
        super().__init__()
        self.block, self.tokens = block, None

    def forward(self, x, *args, **kwargs):
        return self.block(x, *args, **kwargs) + torch.nn.functional.one_hot(self.tokens % 32, 32)


def test_a_model_whose_logits_need_more_than_the_residual_is_refused_by_site(tokenizer):
    model = theirs("gpt2")
    leaky = model.transformer.h[1] = Leaky(model.transformer.h[1])
    model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(leaky, "tokens", kwargs["input_ids"]), with_kwargs=True
    )
    with pytest.raises(BridgeError, match=r"GPT2LMHeadModel does from blocks.0.resid_pre onward must follow from the"):
        HfModel(model, tokenizer)


class Twofold(torch.nn.Module):
    """A block whose output needs what entered it beside what its MLP reads."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(x, *args, **kwargs) + x.sin()


def test_blocks_that_are_not_two_halves_get_a_site_each(tokenizer):
    model = theirs("gpt2")
    for l, block in enumerate(model.transformer.h):
        model.transformer.h[l] = Twofold(block)
    found = HfModel(model, tokenizer)
    assert found.sites == ("blocks.0.resid_pre", "blocks.1.resid_pre", "blocks.2.resid_pre", "final_resid")
    check_hybrid_pass(found)


def test_a_list_within_the_blocks_is_not_taken_for_them(tokenizer):
    model = theirs("gpt2")
    model.transformer.h[1].mlp.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    assert len(HfModel(model, tokenizer).sites) == 7


def test_models_without_residual_sites_are_refused(tokenizer):
    model = theirs("gpt2")
    model.config.n_layer = 4
    with pytest.raises(BridgeError, match=r"GPT2LMHeadModel must have one list of 4 blocks \(.*\) .* none"):
        HfModel(model, tokenizer)
    model = theirs("gpt2")
    model.others = torch.nn.ModuleList(model.transformer.h[0] for _ in range(3))
    with pytest.raises(BridgeError, match="must have one list of 3 blocks .* got transformer.h, others"):
        HfModel(model, tokenizer)
    config = transformers.T5Config(
        d_model=32, d_ff=32, num_layers=2, num_heads=2, vocab_size=V, decoder_start_token_id=0
    )
    with pytest.raises(BridgeError, match="must be a decoder alone, got T5ForConditionalGeneration with an encoder"):
        HfModel(transformers.T5ForConditionalGeneration(config), tokenizer)


def test_half_precision_and_what_overflowed_in_it_are_refused(tokenizer):
    with pytest.raises(BridgeError, match=r"must be in float32, got torch.float16; call its float\(\), or load"):
        HfModel(theirs("gpt2").half(), tokenizer)
    model = theirs("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e6)
    with pytest.raises(BridgeError, match="must be finite, got infinite values or NaN first at blocks.2.resid_pre"):
        HfModel(model.half().float(), tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_no_pass_waits_for_the_device(tokenizer, name, monkeypatch):
    """On torch's device without numbers, where whatever asks for one fails.

    Left out is that transformers itself looks once a pass whether several sequences are packed into one.
    """
    model = HfModel(theirs(name), tokenizer)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    entering = {
        site: (rows.to("meta"), x.detach().to("meta").requires_grad_()) for site, (rows, x) in spread(model).items()
    }
    model.model.to("meta")
    tokens = random_tokens(sum(len(rows) for rows, _ in entering.values())).to("meta")
    assert model.run(tokens)[0]["final_resid"].shape == (*tokens.shape, model.width)
    model.enter(tokens, entering).sum().backward()
    assert all(x.grad is not None for _, x in entering.values() if len(x))


def test_the_longest_sequence_is_known(tokenizer):
    assert built("gpt2").n_ctx == 40 and built("bloom").n_ctx is None and ours(tokenizer, n_ctx=9).n_ctx == 9
