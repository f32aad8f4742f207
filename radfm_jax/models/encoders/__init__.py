"""Vision encoders that can take the place of the 3D vision transformer: 2D encoders of slices, and CT-ViT.

`kinds.py` lists them all; the config of each is below `model.vision`, its parameters are below `vit/`.
"""
