"""Parts that the recipes share."""

import logging

# Importing transformers imports torchao and, by way of PEFT, bitsandbytes, where they are installed. Both warn of
# themselves then, whatever the run is about.
for _logger, _words in (
    ("torch.utils._pytree", "is an Enum subclass and is now natively supported"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
):
    logging.getLogger(_logger).addFilter(lambda record, words=_words: words not in str(record.msg))
