"""FlashHead in third-party engines: transformers and vLLM.

Answers: where does a model's output head call FlashHead? This is the top layer: nothing else
imports from here.
"""
