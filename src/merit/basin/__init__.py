"""Basin preparation: making a merge-ready base where none is at hand. It trains nothing by itself: stages are runs.

``assemble`` joins a vision encoder and a language model into one checkpoint; ``preparation`` puts it and the training
stages in order. Source: Choi & Kim, arXiv 2606.01717, §4 (merge-ready initialization, LLaVA-style stages 1, 1.5, 2).
"""
