"""A batch as Liger's modules take it, and one step over it."""

import torch


def make(*, bias=True, dtype=torch.float32, pairs=3, length=11, vocab=67, dim=16):
    generator = torch.Generator().manual_seed(pairs + length)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        "lin_weight": random(vocab, dim).requires_grad_(),
        "_input": random(2 * pairs, length, dim).requires_grad_(),
        "target": torch.randint(0, vocab, (2 * pairs, length), generator=generator),
        "bias": random(vocab).requires_grad_() if bias else None,
        "ref_input": random(2 * pairs, length, dim),
        "ref_weight": random(vocab, dim),
        "ref_bias": random(vocab) if bias else None,
    }
    for row in range(2 * pairs):
        tensors["target"][row, : 1 + row % 4] = -100
        tensors["target"][row, length - row % 3 :] = -100
    return tensors


def run(module, tensors, scale=1.0):
    loss, aux = module(**tensors)
    inputs = [x for x in tensors.values() if x is not None and x.requires_grad]
    return loss.detach(), aux, torch.autograd.grad(scale * loss, inputs)
