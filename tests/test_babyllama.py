"""Really trained weights (BabyLlama: character level, TinyStories) give what a trained model gives.

The converter here turns the llama2.c file into the decoder's parameters; nothing of it is in the project. Another
pairing of RoPE channels or another scale of the scores is far from the numbers below; a slightly different activation
is not, which is for test_decoder.py to see.
"""

import struct

import jax
import numpy as np
import pytest

from rpt_jax.config import ModelConfig, SampleConfig
from rpt_jax.corpus.tokenizer import load_tokenizer
from rpt_jax.policy import sampler, scorer
from rpt_jax.records import Prompts

pytestmark = pytest.mark.realdata
START = 1  # <s>, before every story; then comes the space that SentencePiece puts before a text
STORIES = [
    "Once upon a time there was a little dog named Max. Max loved to play in the park with his friends.",
    'Tom and Sue went to the beach. They saw a big fish in the water. Tom said, "Look, Sue! It is so big!"',
    "One day, a girl found a red ball under the tree. She was very happy and took it home to show her mom.",
]
WORDS = """
a about after all and are as asked at away back ball bear because bed best better big bird blue box boy but by came can
car cat come could dad daddy day did do dog door down eat end eyes fast felt find flower for found friend friends from
fun garden gave get girl give go good got ground had happy has have he help helped her him his home house hug i in
inside is it jump keep knew learned let like liked lily little live lived look looked lots loved made make mom mommy
more named never new nice not of off old on once one open opened other out outside park people place play played playing
pretty put ran red room run sad said saw see share she smiled so some something started stop sun sunshine surprised that
the their them then there they thing things this thought time to together too took toy toys tree tried two up upon very
walked want wanted was water went were what when where who will with would yes you
"""


def read_llama2c(file) -> tuple[ModelConfig, dict]:
    """A llama2.c checkpoint, version 0: seven int32, then each kind of weight for all layers in turn, [out, in]."""
    content = file.read_bytes()
    D, F, L, H, K, V, _ = struct.unpack("<7i", content[:28])
    C = D // H
    model = ModelConfig(
        vocab_size=V,
        width=D,
        layers=L,
        heads=H,
        kv_heads=K,
        head_channels=C,
        hidden=F,
        norm_epsilon=1e-5,
        tied_head=True,
    )
    weights, place = np.frombuffer(content, "<f4", offset=28), 0

    def take(*shape):
        nonlocal place
        place += np.prod(shape)
        return weights[place - np.prod(shape) : place].reshape(shape)

    def halves(w_LOD, heads):
        """[L, out, in] with RoPE pairs (2i, 2i + 1) to [L, in, heads, C] with pairs (i, i + C/2)."""
        w_LHI2D = w_LOD.reshape(L, heads, C // 2, 2, D)
        return w_LHI2D.swapaxes(2, 3).reshape(L, heads, C, D).transpose(0, 3, 1, 2)

    embedding_VD = take(V, D)
    layers = {
        "attention_norm": {"scale": take(L, D)},
        "wq": halves(take(L, D, D), H),
        "wk": halves(take(L, K * C, D), K),
        "wv": take(L, K * C, D).reshape(L, K, C, D).transpose(0, 3, 1, 2),
        "wo": take(L, D, H * C).reshape(L, D, H, C).transpose(0, 2, 3, 1),
        "mlp_norm": {"scale": take(L, D)},
        "w_gate": take(L, F, D).swapaxes(1, 2),
        "w_down": take(L, D, F).swapaxes(1, 2),
        "w_up": take(L, F, D).swapaxes(1, 2),
    }
    return model, {"embedding": embedding_VD, "layers": layers, "final_norm": {"scale": take(D)}}


@pytest.fixture(scope="module")
def baby(real_data):
    """(ModelConfig, parameters, tokenizer)"""
    folder = real_data / "babyllama"
    return *read_llama2c(folder / "model5000.bin"), load_tokenizer(folder / "tok105.model")


def nats_per_character(model, params, tokenizer, texts) -> np.ndarray:
    rows = [[START, *tokenizer.encode(" " + text)] for text in texts]
    lengths_B = np.array([len(row) for row in rows])
    tokens_BT = np.array([row + [0] * (max(lengths_B) - len(row)) for row in rows])
    score = jax.jit(scorer.score_tokens, static_argnums=1)
    return -np.asarray(score(params, model, tokens_BT, lengths_B)).sum(axis=1) / (lengths_B - 1)


def test_simple_stories_are_likely(baby):
    """Below 1 nat per character each; uniform is ln 105 = 4.65, the published validation loss 0.7366."""
    model, params, tokenizer = baby
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 936_448
    nats = nats_per_character(*baby, STORIES)
    assert (nats < 1).all() and (nats > 0.1).all(), nats  # nothing can be this sure unless it sees the future
    scrambled = ["".join(np.random.default_rng(0).permutation(list(story))) for story in STORIES]
    assert (nats_per_character(*baby, scrambled) > 3).all(), "scrambled letters are as likely as stories"


def test_greedy_text_is_readable(baby):
    """At least nine in ten words of a greedy continuation are plain English ones."""
    model, params, tokenizer = baby
    tokens_NT = np.array([[START, *tokenizer.encode(" Once upon a time")]], np.int32)
    prompts = Prompts(tokens_NT, np.array([tokens_NT.shape[1]]), np.zeros((1, 2), np.uint32), None, None, None)
    sampling = SampleConfig(group_size=1, temperature=0.0, max_tokens=128, tokens_per_call=64)
    rollouts = sampler.sample(params, model, sampling, prompts, jax.random.key(0), (START, tokenizer.end_of_text))
    text = tokenizer.bytes_of(rollouts.tokens_NGR[0, 0]).decode()
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    assert len(words) > 20 and len(set(words)) > 12, text
    known = [word in WORDS.split() for word in words[:-1]]  # the last one may be cut
    assert np.mean(known) >= 0.9, text
