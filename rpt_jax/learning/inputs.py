"""What a config's paths lead to, and whether all of it fits together: looked at before anything is compiled."""

import dataclasses
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from rpt_jax.config import Config, ModelConfig
from rpt_jax.corpus.positions import AnnotatedDocuments, Positions
from rpt_jax.corpus.prompts import assemble
from rpt_jax.corpus.questions import Questions, to_learn_from
from rpt_jax.corpus.templates import Template, load_template
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.learning import judge, policy_folder, run_folder, targets, text_loss
from rpt_jax.learning.collect import Source
from rpt_jax.mesh import batch_parts, check_batch_divides, make_mesh
from rpt_jax.parts import parts_of_groups
from rpt_jax.records import InputError, Params

Policy = tuple[ModelConfig, Params, Tokenizer]
OF_THE_RUN = ("dtype", "param_dtype", "remat")  # settings of the model that a run chooses, whatever its policy had
LOST_ABOVE = 512
"""Adam moves a weight by about the learning rate, and bfloat16, whose numbers are at least a 256th of themselves apart,
rounds that away in weights above so many times the rate."""
USUAL_WEIGHT = 0.02  # of published decoders, in size


@dataclass(frozen=True)
class Inputs:
    """What a config's paths lead to; the arguments of train."""

    config: Config
    policy: Policy
    annotated: AnnotatedDocuments | Questions
    positions: Positions
    template: Template
    mesh: Mesh


def load_inputs(config: Config) -> Inputs:
    """Opens everything that a config names; raises InputError for what is missing or does not fit together.

    The shape of the model comes with the policy; config.model says its numerics (OF_THE_RUN).
    """
    config.check()
    run_folder.require_wandb(config)
    mesh = make_mesh(config.mesh)
    check_divides(config, mesh)
    model, params, tokenizer = policy_folder.load_policy(config.policy, mesh)
    if config.corpus.tokenizer:
        given = load_tokenizer(config.corpus.tokenizer)
        policy_folder.check_tokenizer(given, tokenizer.vocab_size, tokenizer.fingerprint, config.corpus.tokenizer)
    model = with_numerics(config.model, model)
    params = jax.tree.map(lambda x: x.astype(model.param_dtype), params)
    annotated, positions = to_learn_from(config, tokenizer)
    template = load_template(config.prompt.template, config.prompt.chat)
    return Inputs(config, (model, params, tokenizer), annotated, positions, template, mesh)


def with_numerics(asked: ModelConfig, policy: ModelConfig) -> ModelConfig:
    """The policy's shape with the numerics asked for; raises InputError if another shape was asked for."""
    default = ModelConfig()
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(policy, field.name), getattr(asked, field.name)
        if field.name not in OF_THE_RUN and here not in (there, getattr(default, field.name)):
            raise InputError(f"model.{field.name}={here}, but the policy has {there}: leave it out, the policy says it")
    return dataclasses.replace(policy, **{name: getattr(asked, name) for name in OF_THE_RUN})


def check(source: Source, annotated: AnnotatedDocuments | Questions, positions: Positions) -> None:
    """Raises InputError, with the remedy, for whatever would stop the run or make it meaningless later."""
    config, tokenizer = source.config, source.tokenizer
    config.check()
    run_folder.require_wandb(config)
    check_divides(config, source.mesh)
    policy_folder.check_vocabulary(source.model, tokenizer, "the starting policy")
    are_questions = isinstance(annotated, Questions)
    judge.check_questions(config, are_questions)
    header = annotated.header
    if header["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"the {'questions' if are_questions else 'annotated documents'} were read with a tokenizer of "
            f"{header['vocab_size']} ids (fingerprint {header['tokenizer']}), the policy has one of "
            f"{tokenizer.vocab_size} ids (fingerprint {tokenizer.fingerprint}): open them with the policy's"
        )
    rate = config.update.learning_rate
    if source.model.param_dtype == "bfloat16" and 0 < LOST_ABOVE * rate < USUAL_WEIGHT:
        raise InputError(
            f"model.param_dtype=bfloat16 with update.learning_rate={rate:g}: updates are rounded away in all weights "
            f"above about {LOST_ABOVE * rate:.2g}, which is most of them: leave parameters in float32; "
            "--model.dtype bfloat16 computes in bfloat16 all the same"
        )
    if config.sample.temperature == 0:
        raise InputError("sample.temperature=0: greedy rollouts of a prompt are all the same; use 0.8 (paper) or so")
    if config.steps < 1 or config.dynamic_sampling.max_rounds < 0:
        raise InputError(
            f"steps={config.steps}, dynamic_sampling.max_rounds={config.dynamic_sampling.max_rounds}: use 1 or more "
            "steps, 0 or more rounds"
        )
    for name in ("every", "keep"):
        if getattr(config.checkpoint, name) < 1:
            raise InputError(f"checkpoint.{name}={getattr(config.checkpoint, name)}: use 1 or more")
    more = {"threshold": " with a lower --positions.threshold"}
    more |= dict.fromkeys(("top_share", "random"), " with a higher --positions.share")
    if len(positions) < config.batch_size:
        raise InputError(
            f"{len(positions)} {'questions' if are_questions else 'positions'} are fewer than batch_size="
            f"{config.batch_size} prompts a step: lower it, or {'give' if are_questions else 'select'} more"
            f"{more.get(config.positions.select, '') if not are_questions else ''}"
        )
    if config.reward.kind == "information_gain" and not positions.indices.all():
        raise InputError(
            "reward.kind=information_gain at the first token of a document: without a thought nothing predicts it; "
            "use --positions.minimum-context of 1 or more"
        )
    targets.check(source, positions)
    assemble(tokenizer, source.template, config.prompt, source.documents, [positions[0]])


def check_divides(config: Config, mesh: Mesh) -> None:
    """Raises InputError for a batch, or a microbatch, that does not divide over the mesh; after config.check."""
    check_batch_divides(config.batch_size, mesh)
    units, microbatches = batch_parts(mesh), config.update.microbatches
    what = f"update.microbatches={microbatches} on each of {units} devices, which together is "
    parts_of_groups(config.batch_size, config.sample.group_size, units * microbatches, what)
    text_loss.check(config, mesh)
