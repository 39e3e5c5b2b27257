"""What every training run needs, whatever it trains (``pip install monai-drdm[train]``: pytorch-ignite, PyYAML).

A ``Task`` (module ``task``) describes a network, its batches and its loss. ``run_task`` (module ``loop``) trains it in
a folder of its own; the run can be stopped at any time and resumed from there.
"""

from importlib.util import find_spec

if _missing := [name for name in ("ignite", "matplotlib", "tensorboard", "yaml") if find_spec(name) is None]:
    raise ImportError(f"monai_drdm.training needs {', '.join(_missing)}: pip install 'monai-drdm[train]'.")
