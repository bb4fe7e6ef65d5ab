"""What a bundle's rounding costs on held-out text: the quality gate's numbers, as the manifest keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# 4-bit weights of a good model lie well below these; a broken scale or a layer that overflows lies far above.
MAX_KL_BITS = 0.05
MAX_RISE = 0.02


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A bundle against its checkpoint in float32, on the same tokens. Bits are to base 2."""

    text_sha256: str
    num_tokens: int  # predicted
    bits_per_byte: float  # cross-entropy of the bundle's predictions
    float32_bits_per_byte: float
    kl_bits: float  # mean over tokens of KL(float32 || bundle)
    same_first_choice: float  # share of tokens for which both put the same token first
    max_kl_bits: float = MAX_KL_BITS
    max_rise: float = MAX_RISE  # of the bits per byte, relative

    @property
    def rise(self) -> float:
        return self.bits_per_byte / self.float32_bits_per_byte - 1

    @property
    def passed(self) -> bool:
        """A NaN does not pass."""
        return self.kl_bits <= self.max_kl_bits and self.rise <= self.max_rise

    def describe(self) -> str:
        """One line: the numbers, and the limits where one is exceeded."""
        numbers = (
            f"{self.bits_per_byte:.4f} bits/byte, float32 {self.float32_bits_per_byte:.4f} ({self.rise:+.2%}), "
            f"KL {self.kl_bits:.4f} bits a token, same first choice {self.same_first_choice:.1%}"
        )
        limits = f"; allowed: {self.max_rise:+.2%}, {self.max_kl_bits:g} bits"
        return numbers if self.passed else f"quality gate failed: {numbers}{limits}"

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quality:
        """The inverse; raises `KeyError` for a missing number."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})
