"""Trains a character-level transformer on the text that ships with Python, in mixed precision.

A training loop with everything around the optimizer that real ones have: autocast, gradient
accumulation, a GradScaler, clipping, warm restarts, TensorBoard and checkpoints. With fusedopt the
unscaling, the check for inf and nan, the norm and the clip all happen inside `optimizer.step()`;
`--optimizer torch` runs the same loop the usual way, and continues the same checkpoints.
"""

import argparse
import os
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from _common import pick_device, progress_bars, synchronize
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.tensorboard import SummaryWriter

import fusedopt

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 2
BATCH, ACCUMULATION, LEARNING_RATE, MAX_GRAD_NORM = 4, 2, 4e-3, 1.0
LOG_EVERY, SAVE_EVERY = 20, 100
PROMPT = "A function is "


class Text:
    """Python's help topics as a tensor of character numbers; the last twentieth is for the test."""

    def __init__(self, device: torch.device) -> None:
        text = "\n".join(topics.values())
        self.characters = sorted(set(text))
        self.numbers = {character: i for i, character in enumerate(self.characters)}
        self.train, self.test = self.encode(text).to(device).tensor_split([len(text) * 19 // 20])

    def encode(self, text: str) -> Tensor:
        """Returns the number of every character of `text`."""
        return torch.tensor([self.numbers[character] for character in text])

    def batch(self, source: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Returns the windows that `seed` stands for, and the same windows one character later."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(source) - CONTEXT, (BATCH, 1), generator=generator)
        windows = source[(starts + torch.arange(CONTEXT + 1)).to(source.device)]
        return windows[:, :-1], windows[:, 1:]

    def decode(self, numbers: Tensor) -> str:
        """Returns the text that `numbers` stand for."""
        return "".join(self.characters[i] for i in numbers.tolist())


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns the shape (batch, context, WIDTH)."""
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character at every position of its context."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns logits (batch, context, vocabulary) for numbers (batch, context)."""
        x = self.character(characters) + self.position.weight[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, seed: int) -> Tensor:
        """Returns `prompt` with `length` sampled characters behind it."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(length):
            logits = self(prompt[None, -CONTEXT:])[0, -1].float().cpu()
            choice = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
            prompt = torch.cat([prompt, choice.to(prompt.device)])
        return prompt


class Training:
    """One training run: what is in a checkpoint, and how a step is done."""

    PARTS = ("model", "optimizer", "schedule", "scaler")

    def __init__(self, args: argparse.Namespace, text: Text, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.text, self.seed, self.device = text, args.seed, device
        self.model = Transformer(len(text.characters)).to(device)
        weights = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.dtype = getattr(torch, args.dtype)
        scaled = self.dtype == torch.float16
        self.optimizer: torch.optim.AdamW
        self.scaler: torch.amp.GradScaler
        if args.optimizer == "fused":
            self.optimizer = fusedopt.AdamW(
                groups, lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, backend=args.backend
            )
            self.scaler = fusedopt.GradScaler(device.type, enabled=scaled)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
            self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.schedule = CosineAnnealingWarmRestarts(self.optimizer, T_0=100, T_mult=2)
        self.step_number = 0
        # Both stay on the device: reading them is what waits for it, so that is done when logging.
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def loss(self, source: Tensor, seed: int) -> Tensor:
        """Returns the mean loss per character of one batch, in float32."""
        inputs, targets = self.text.batch(source, seed)
        lower = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if lower else None, enabled=lower):
            logits = self.model(inputs)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def test_loss(self) -> float:
        """Returns the mean loss over batches that are never trained on, the same every time."""
        return torch.stack([self.loss(self.text.test, seed) for seed in range(16)]).mean().item()

    def step(self) -> Tensor:
        """Does one optimizer step over ACCUMULATION batches and returns their mean loss."""
        total = torch.zeros((), device=self.device)
        for part in range(ACCUMULATION):
            # The batch follows from the step, so a resumed run sees what it would have seen.
            seed = (self.seed << 40) + self.step_number * ACCUMULATION + part
            loss = self.loss(self.text.train, seed) / ACCUMULATION
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if isinstance(self.optimizer, fusedopt.AdamW):
            self.scaler.step(self.optimizer)
            self.norm = self.optimizer.last_grad_norm
            self.skipped += self.optimizer.last_step_skipped
        else:
            self.scaler.unscale_(self.optimizer)
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.scaler.step(self.optimizer)
            # torch does not tell whether it skipped; it does so when an element is inf or nan.
            self.skipped += ~self.norm.isfinite() & self.scaler.is_enabled()
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return total

    def save(self, path: Path) -> None:
        """Writes a checkpoint in torch's own format, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = {name: getattr(self, name).state_dict() for name in self.PARTS}
        saved |= {"step": self.step_number, "skipped": self.skipped.item()}
        torch.save(saved, path.with_name(path.name + ".new"))
        os.replace(path.with_name(path.name + ".new"), path)

    def resume(self, path: Path) -> None:
        """Goes on where the checkpoint was written, by either optimizer."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        for name in self.PARTS:
            if saved[name]:  # empty for a scaler that was not enabled
                getattr(self, name).load_state_dict(saved[name])
        self.step_number = saved["step"]
        self.skipped.fill_(saved["skipped"])


def train(training: Training, args: argparse.Namespace) -> float:
    """Trains until `args.steps`, logging and saving; returns the seconds per step."""
    first, start = training.step_number, time.perf_counter()
    with SummaryWriter(args.logdir) as writer, progress_bars() as bars:
        bar = bars.add_task(args.optimizer, total=args.steps, completed=first, note="")
        while training.step_number < args.steps:
            loss = training.step()
            step = training.step_number
            bars.update(bar, completed=step)
            if step % LOG_EVERY == 0 or step == args.steps:
                scalars = {
                    "loss": loss.item(),
                    "grad_norm": training.norm.item(),
                    "scale": training.scaler.get_scale(),
                    "skipped_steps": training.skipped.item(),
                    "learning_rate": training.schedule.get_last_lr()[0],
                }
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
                bars.update(bar, note="loss {loss:.3f}  norm {grad_norm:.2f}".format(**scalars))
            if args.checkpoint and (step % SAVE_EVERY == 0 or step == args.steps):
                training.save(args.checkpoint)
    synchronize(training.device)
    return (time.perf_counter() - start) / max(1, training.step_number - first)


def main() -> None:
    """Trains, and prints the loss before and after, and a sample of what was learnt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700, help="of the whole run")
    parser.add_argument("--optimizer", choices=["fused", "torch"], default="fused")
    parser.add_argument("--backend", default="auto", help="of fusedopt: auto, cpu, cuda, ...")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of autocast; float16 scales"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sample")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from and to save to")
    parser.add_argument("--logdir", default="build/runs/char_transformer", help="for TensorBoard")
    args = parser.parse_args()
    device = pick_device(args.device)
    args.dtype = args.dtype or ("float16" if device.type == "cuda" else "bfloat16")

    text = Text(device)
    training = Training(args, text, device)
    if args.checkpoint and args.checkpoint.exists():
        training.resume(args.checkpoint)
        print(f"resumed {args.checkpoint} at step {training.step_number}")
    before = training.test_loss()
    seconds = train(training, args)
    after = training.test_loss()
    print(f"loss per character on unseen text: {before:.3f} before, {after:.3f} after")
    print(f"{1000 * seconds:.0f} ms per step, {training.skipped.item()} steps skipped in all")
    sample = training.model.generate(text.encode(PROMPT).to(device), 300, args.seed)
    print(f"sample:\n{text.decode(sample)}\ncurves: tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    main()
