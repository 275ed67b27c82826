"""Complete models of random weights in under 2 MB, one a family: for tests, and for a study that takes a minute.

They have what real models have and what code likes to overlook: fewer key/value heads than heads, a head
size that is not hidden size over heads, tied and untied embeddings, a mixture of experts, and rows whose
length is no multiple of 8, so that packed bits have a rest. A change here that changes the files raises `TINY_RECIPE`.
"""

from __future__ import annotations

import copy
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from sparse_ft.models.families import ARCHITECTURES, Architecture
from sparse_ft.models.loading import save_model

__all__ = ["KINDS", "make_tiny", "tiny_config", "tiny_tokenizer"]

KINDS = tuple(f"tiny-{family}" for family in ARCHITECTURES)

_VOCABULARY = 512
_CONTEXT = 2048
_SEEDS = {"tiny-llama": 11, "tiny-mistral": 12, "tiny-mixtral": 13}  # of the others their names make one
_SIZES = {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": _CONTEXT,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    # Wide enough that logits differ: at the usual 0.02 so small a model answers everything alike.
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What the merges are learned from: the words of the tasks' prompts, and ordinary English.
_TEXT = """
Question: is it true that the water of the sea is the same as the water of a river?
Answer: yes, yes, yes, or no, no, no; true, true, true, or false, false, false
Question: can you play the game with more than two players at the same time?
Answer: no
Passage: The first season of the series was shown in the United States in the year of the war. It has since
been one of the most popular shows, and there are now more than one hundred episodes. In 2017 it was said
that the next season would be the last one. They have not been seen together for a long time, which is why
some people think that there will never be another one. He was born in New York and went to school there.
Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How
many clips did Natalia sell altogether in April and May?
Answer: She sold 48 / 2 = 24 clips in May. Altogether she sold 48 + 24 = 72 clips. #### 72
A man is sitting on a roof. He starts pulling up roofing with his hands and then he is using a knife to cut
it. A woman is standing in the kitchen, talking to the camera, and shows how to make a cake with flour and
eggs. The player throws the ball, runs down the field and is stopped. What do we do when this is the right
answer? Either we know it, or we do not; from what has been said about these things no more can be found.
""".strip()


def tiny_config(kind: str) -> PretrainedConfig:
    """The architecture of a tiny model: the sizes below, and what the row of its family has otherwise.

    Raises:
        ValueError: not one of ``KINDS``.
    """
    # A copy: transformers completes nested values, such as those of rope, in place.
    return AutoConfig.for_model(_row(kind).model_type, **copy.deepcopy({**_SIZES, **_row(kind).tiny}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens that reads any text and, as LLaMA's does, puts ``<s>`` before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_tiny(kind: str, folder: str | Path) -> Path:
    """Writes a tiny model as a float32 Hugging Face checkpoint; the same bytes every time.

    The weights are drawn from a fixed seed, and the caller's random state is left as it was.

    Raises:
        ValueError: not one of ``KINDS``.
    """
    config = tiny_config(kind)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(_SEEDS.get(kind) or zlib.crc32(kind.encode()))
        attention = _row(kind).attention
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return save_model(model, tiny_tokenizer(), folder)


def _row(kind: str) -> Architecture:
    if kind not in KINDS:
        raise ValueError(f"{kind} is not one of {', '.join(KINDS)}")
    return ARCHITECTURES[kind.removeprefix("tiny-")]
