"""The commands of ``monai-drdm``, one module each.

A module has ``configure``, which adds its arguments to a parser, and imports what it needs when it runs, so that help
and short commands do not wait for torch and MONAI.
"""
