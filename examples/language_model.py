"""Language models of Hugging Face's transformers, trained in blocks: GPT-2 and Llama learn Python byte by byte.

    python examples/language_model.py                          # a minute on two CPU cores
    python examples/language_model.py --heads shared           # heads read a copy of the last block's readout

The networks are small and random. The text is the source of Python's standard library, which every machine has, or a
file or folder of your own (--text). It needs pip install 'localgrad[hf]'.
"""
# pyright: reportMissingImports=false

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import localgrad as lg

BYTES, BATCH, WIDTH = 256, 8, 96


def gpt2(context: int) -> GPT2LMHeadModel:
    size: Any = {"vocab_size": BYTES, "n_positions": context, "n_embd": WIDTH, "n_layer": 6, "n_head": 4}
    plain: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    # Of a readout that is tied to the embedding, the first block alone would train the table.
    return GPT2LMHeadModel(GPT2Config(**size, **plain, tie_word_embeddings=False))


def llama(context: int) -> LlamaForCausalLM:
    size: Any = {"vocab_size": BYTES, "max_position_embeddings": context, "hidden_size": WIDTH, "num_hidden_layers": 6}
    more: Any = {"num_attention_heads": 4, "intermediate_size": 4 * WIDTH, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**size, **more))


def train(model: lg.LocalModel, text: lg.Text, steps: int) -> lg.PeakBytes:
    """Trains for some steps of 8 contexts, and measures the memory of one more step."""
    optimizer = torch.optim.AdamW(lg.param_groups(model, weight_decay=0.1), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)

    def step(number: int) -> None:
        lg.local_backward(model, *text.batch(range(number * BATCH, (number + 1) * BATCH)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for number in range(steps):
        step(number)
    return lg.measure_peak(lambda: step(steps), model=model, optimizers=[optimizer])


@torch.no_grad()
def bits_per_byte(network: nn.Module, task: lg.LanguageModel, text: lg.Text) -> float:
    """On 64 contexts of the text."""
    x, y = text.batch(range(64))
    return task.scores(task.metrics(network.eval()(x), y))["bits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--heads", choices=("own", "shared"), default="own")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    makers: dict[str, Callable[[int], Any]] = {"GPT-2": gpt2, "Llama": llama}
    try:
        text, test = lg.read_text(args.text, context=args.context)
        for name, make in makers.items():
            for blocks in (1, args.blocks):
                torch.manual_seed(0)
                network = make(args.context)
                task = lg.LanguageModel(BYTES, shared=network.lm_head if args.heads == "shared" else None)
                how: Any = {"method": lg.bp()} if blocks == 1 else {"method": lg.dgl(), "coupling": lg.MAN(0.99)}
                example = torch.zeros(BATCH, args.context, dtype=torch.int64)
                model = lg.localize(network, blocks=blocks, example=example, task=task, **how)
                peak = train(model, text, args.steps).total / 2**20
                bits = bits_per_byte(network, task, test)
                print(f"{name}, blocks: {blocks}: {bits:.3f} bits per byte, peak memory {peak:.1f} MiB")
    except lg.UserError as error:
        parser.error(str(error))
    print("What to conclude: blocks learn text in less memory. On one seed, some hundredths of a bit are chance. After")
    print("more steps the ways differ: docs/tasks.md compares them over seeds, beside exact training in as few bytes.")


if __name__ == "__main__":
    main()
