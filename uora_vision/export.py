"""Out of a model into PEFT's formats, and a PEFT VeRA adapter into a model. `docs/export.md` says what is exact.

The files are written and read without PEFT.
"""

from .interop.peft_read import from_peft_vera
from .interop.peft_write import ExportReport, to_peft_lora, to_peft_vera

__all__ = ["ExportReport", "from_peft_vera", "to_peft_lora", "to_peft_vera"]
