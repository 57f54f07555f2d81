"""UORA for frozen vision, vision-language and language transformers.

The public names are those in `__init__.pyi`. Each imports its module, and torch, when it is first asked for: so the
command `uora` answers help and mistakes without them, and nothing heavier than torch comes with this package.
"""

import lazy_loader

from .version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
