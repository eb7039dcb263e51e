"""The video models of ComfyUI that PSA knows: one file a family, found by class in ``known``."""
