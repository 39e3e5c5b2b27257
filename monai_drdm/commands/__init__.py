"""The commands of ``monai-drdm``, one module each; ``monai_drdm.cli`` lists them.

The modules import what they run only when they run it: ``monai-drdm --help`` then needs neither torch nor MONAI, and
starts fast.
"""
