"""A few small steps of everything, to be run under compute-sanitizer by gpu_check.py."""

from __future__ import annotations

import torch
from cases import TABLE, make_fused, richest

SHAPES = ((1031,), (3, 5), (1,), (0,), (70_003,))
CLIPS = {
    "max_grad_norm": 1.0,
    "max_grad_norm_per_param": 0.5,
    "max_grad_value": 0.3,
    "skip_nonfinite": True,
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Returns random numbers on the GPU, `offset` elements past an aligned address."""
    count = torch.Size(shape).numel()
    memory = torch.randn(count + offset).to(dtype).cuda()
    return memory[offset:].view(shape)


def main() -> None:
    """Runs the steps, and says so when all are done."""
    for entry in TABLE.values():
        for dtype in (torch.float32, torch.bfloat16):
            for offset, clips in ((0, {}), (1, CLIPS)):
                params = [torch.nn.Parameter(numbers(s, dtype, offset)) for s in SHAPES]
                optimizer = make_fused(entry, params, "cuda", **richest(entry), **clips)
                for _ in range(2):
                    for param, shape in zip(params, SHAPES, strict=True):
                        param.grad = numbers(shape, dtype, offset)
                    optimizer.step()
    torch.cuda.synchronize()
    print("all small steps done")


if __name__ == "__main__":
    main()
