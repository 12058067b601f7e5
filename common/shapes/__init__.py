"""Shapes: GenEval in miniature, on 32x32 images, with prompts, reasoning, a detector and scores."""
