"""Every model of timm, open_clip and the families of transformers, and the proof that the injector covers it."""
