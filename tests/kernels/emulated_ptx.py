"""PTX instructions emulated in numpy, so that weight decoding runs without a GPU.

Covers only what the kernels' PTX uses, on arrays of 32-bit words; anything else raises.
"""

from __future__ import annotations

import re

import numpy as np

Words = np.ndarray


def permute_bytes(a: Words, b: Words, selector: Words) -> Words:
    """prmt.b32: the low three bits of each selector nibble choose one of eight bytes; its top bit
    replicates that byte's sign bit instead."""
    found = np.zeros_like(selector)
    for n in range(4):
        nibble = (selector >> np.uint32(4 * n)) & np.uint32(15)
        place = (nibble & np.uint32(3)) * np.uint32(8)
        byte = (np.where(nibble & np.uint32(4), b, a) >> place) & np.uint32(255)
        repeated = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        byte = np.where(nibble & np.uint32(8), repeated, byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * n)
    return found


def combine_bits(a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3.b32: look up each bit triple (a, b, c) in `table`."""
    found = np.zeros_like(a)
    for entry in range(8):
        if int(table.flat[0]) >> entry & 1:
            terms = [w if entry >> (2 - n) & 1 else ~w for n, w in enumerate((a, b, c))]
            found |= terms[0] & terms[1] & terms[2]
    return found


def round_to_bf16(values: np.ndarray) -> Words:
    """Round fp64 values that fp32 represents exactly to bf16 bits, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


def fuse_bf16_pairs(a: Words, b: Words, c: Words) -> Words:
    """fma.rn.bf16x2; fp32 represents every product that occurs."""
    found = np.zeros_like(a)
    for shift in (np.uint32(0), np.uint32(16)):
        halves = [((w >> shift) << np.uint32(16)).view(np.float32).astype(np.float64)
                  for w in (a, b, c)]  # fmt: skip
        found |= (round_to_bf16(halves[0] * halves[1] + halves[2]) & np.uint32(0xFFFF)) << shift
    return found


def fuse_fp16_pairs(a: Words, b: Words, c: Words) -> Words:
    """fma.rn.f16x2: fp64 represents product and sum exactly, so it rounds once."""
    found = np.zeros_like(a)
    for shift in (np.uint32(0), np.uint32(16)):
        halves = [(w >> shift).astype(np.uint16).view(np.float16).astype(np.float64)
                  for w in (a, b, c)]  # fmt: skip
        result = (halves[0] * halves[1] + halves[2]).astype(np.float16)
        found |= result.view(np.uint16).astype(np.uint32) << shift
    return found


def fuse_fp32(a: Words, b: Words, c: Words) -> Words:
    """fma.rn.f32 of bf16 factors; fp32 represents their product exactly."""
    return (a.view(np.float32) * b.view(np.float32) + c.view(np.float32)).view(np.uint32)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permute_bytes,
    "lop3.b32": combine_bits,
    "fma.rn.bf16x2": fuse_bf16_pairs,
    "mul.rn.f16x2": lambda a, b: fuse_fp16_pairs(a, b, np.zeros_like(a)),
    "fma.rn.f16x2": fuse_fp16_pairs,
    "fma.rn.f32": fuse_fp32,
}


def run_ptx(text: str, outputs: int, inputs: list[Words]) -> list[Words]:
    """Return outputs $0 ... of a PTX block as uint32 arrays; the inputs are numbered after them."""
    values = {f"${outputs + n}": array for n, array in enumerate(inputs)}

    def read(operand: str) -> Words:
        if operand in values:
            return values[operand]
        return np.full_like(inputs[0], int(operand, 0))

    for line in text.strip("{} \n").splitlines():
        if not line.strip() or line.startswith(".reg"):
            continue
        operation, operands = re.fullmatch(r"(\S+) (.*);", line.strip()).groups()  # pyright: ignore[reportOptionalMemberAccess]
        target, *sources = operands.split(", ")
        values[target] = OPERATIONS[operation](*map(read, sources))
    return [values[f"${n}"] for n in range(outputs)]
