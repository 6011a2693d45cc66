"""florana: federated LoRA fine-tuning whose server step is exact, or as exact as rank r allows.

The public names stand in `__init__.pyi`, and are loaded when first used, so that `import florana` and
`florana --help` stay fast.

Examples:
    >>> import florana
    >>> florana.best_rank.__module__
    'florana.aggregate.best_rank.project'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
