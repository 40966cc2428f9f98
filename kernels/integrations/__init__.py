"""FlashHead in engines that others wrote: transformers and vLLM.

Answers: where does a model's output head call FlashHead? The top floor: nothing else imports from
here.
"""
