"""``RandDRDMDeform`` and ``RandDRDMDeformd``: one image, or all keys of a sample, deformed at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.config import KeysCollection, NdarrayOrTensor
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm.deformation import Deformation, DeformationParams, FieldDrawer
from monai_drdm.deformation.options import choose, DrawOptions, NetworkLike, with_options
from monai_drdm.fields.sampling import check_modes, Mode, PaddingMode
from monai_drdm.samples import (
    apply_pending,
    as_tensor,
    check_field,
    check_field_fits,
    checked_pixdim,
    spacing_of,
    wrap_like,
)
from monai_drdm.transforms.base import apply_to_image, field_info, KeyedDeformation, take_back
from monai_drdm.transforms.notices import Notices
from monai_drdm.transforms.options import ApplyOptions, ArrayOptions, DeformOptions
from monai_drdm.transforms.randomness import DRDMRandomness
from monai_drdm.transforms.tracing import in_plain_mode, TracedTransform


class _OneField(DRDMRandomness):
    """Finds the deformation of a call: a given field, the field of a record, or a new draw."""

    def deformation(
        self,
        image: Tensor,
        spacing: Sequence[float],
        randomize: bool,
        params: DeformationParams | None,
        field: Tensor | None,
        seed_value: object = None,
    ) -> Deformation | None:
        """The deformation to apply to an image ``(C, *S)``, or None if the transform does not fire.

        Raises:
            TypeError: ``params`` of another kind.
            ValueError: both ``params`` and ``field``, a field that does not fit, or nothing yet to replay.
        """
        if params is not None and field is not None:
            raise ValueError("give params= to replay a record or field= to apply a field, not both.")
        if field is not None:
            check_field(field)
            check_field_fits(field, image)
            return Deformation(field.detach().as_subclass(Tensor).to(image.device, copy=True), spacing)
        if params is not None:
            return self.replay_deformations([image], [spacing], [params])[0]
        return self.draw_deformations([image], [spacing], self.decide([seed_value], randomize))[0]


@with_options(ArrayOptions)
class RandDRDMDeform(_OneField):
    """Deform an image at random into another plausible anatomy (paper, Algorithms 2 and 3).

    A random multi-scale field deforms the image. A network that has learned what real images look like takes back, step
    by step, what became unrealistic. The image is resampled once, by the field that remains.

    Args:
        network: registry name, path of a safetensors file, or loaded network; ``"auto"``: the network of this package
            for the number of dimensions of the image.
        prob: chance that the transform fires.
        mode: ``bilinear``, ``nearest``, ``bicubic`` (2D) or ``label``.
        padding_mode: ``border``, ``zeros`` or ``reflection``.
        invertible: put a record on the output, which ``inverse`` needs.
        options: those of ``ArrayOptions``.

    ``.last`` holds the latest deformation.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        network: NetworkLike = "auto",
        *,
        prob: float = 0.1,
        mode: Mode = "bilinear",
        padding_mode: PaddingMode = "border",
        invertible: bool = True,
        **options: Unpack[ArrayOptions],
    ) -> None:
        TracedTransform.__init__(self)
        DRDMRandomness.__init__(self, prob, FieldDrawer(network, **choose(DrawOptions, options)))
        self.last: Deformation | None = None
        check_modes(mode, padding_mode, 2, "RandDRDMDeform")
        self.mode: Mode = mode
        self.padding_mode: PaddingMode = padding_mode
        self.pixdim = checked_pixdim(options["pixdim"])
        self.invertible = invertible
        self.notices = Notices(type(self).__name__)

    @in_plain_mode
    def __call__(
        self,
        img: NdarrayOrTensor,
        mode: Mode | None = None,
        padding_mode: PaddingMode | None = None,
        randomize: bool = True,
        *,
        params: DeformationParams | None = None,
        field: Tensor | None = None,
    ) -> Tensor:
        """Deform an image.

        Args:
            img: ``(C, *S)`` with 2 or 3 spatial axes.
            mode: overrides the constructor's.
            padding_mode: overrides the constructor's.
            randomize: False replays the last draw.
            params: replays a record instead.
            field: applies this field ``(D, *S)`` in voxels instead.

        Returns:
            ``(C, *S)`` tensor, or MetaTensor where metadata is tracked. The input is left as it is.

        Raises:
            TypeError: not an array or tensor of a real numeric type.
            ValueError: anything that does not fit; see "Inputs and answers" in the documentation.
        """
        img = apply_pending(img)
        image = as_tensor(img, "img")
        mode, padding_mode = mode or self.mode, padding_mode or self.padding_mode
        check_modes(mode, padding_mode, image.ndim - 1, "RandDRDMDeform")
        spacing = spacing_of(img, self.pixdim, "img")
        if self.notices.begin():
            self.notices.look_at_layout(img, image.shape, "img", batched=False)
            self.notices.look_at_patches(img, image.shape[1:], "img")
        self.last = deformation = self.deformation(image, spacing, randomize, params, field)
        moved, fired = apply_to_image(image, deformation, mode, padding_mode)
        out = wrap_like(img, moved)
        if not self.invertible:
            return out
        info = {"kind": "image", "mode": mode, "padding_mode": padding_mode}
        return self.record(out, fired, info | field_info(deformation, tuple(image.shape[1:])))

    @in_plain_mode
    def inverse(self, data: Tensor) -> Tensor:
        """Take back what this transform did to an image, or to data on its grid that carry its records.

        Args:
            data: MetaTensor ``(C, *S)``.

        Returns:
            ``(C, *S)`` MetaTensor without this transform's latest record; the input is left as it is.

        Raises:
            TypeError: data that carry no records.
            ValueError: no record of this transform, or data of another shape than it recorded.
        """
        return take_back(self, data, "data", {})


@with_options(DeformOptions)
class RandDRDMDeformd(_OneField, KeyedDeformation):
    """Dictionary form of ``RandDRDMDeform``: one field, drawn from the image key, moves every key.

    Args:
        keys: keys to deform. They must agree in spatial shape and affine; channels and dtypes may differ.
        network: as in ``RandDRDMDeform``.
        prob: chance that the transform fires.
        options: those of ``DeformOptions``.

    ``.last`` holds the latest deformation. Outputs return to each key's own device.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or a number of modes that is neither 1 nor the number of keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        network: NetworkLike = "auto",
        prob: float = 0.1,
        **options: Unpack[DeformOptions],
    ) -> None:
        KeyedDeformation.__init__(self, keys, choose(ApplyOptions, options))
        DRDMRandomness.__init__(self, prob, FieldDrawer(network, **choose(DrawOptions, options)))
        self.last: Deformation | None = None
        self.image_key = self.keys[0] if options["image_key"] is None else options["image_key"]
        self.pixdim = checked_pixdim(options["pixdim"])
        self.seed_key = options["seed_key"]

    @in_plain_mode
    def __call__(
        self,
        data: Mapping[Any, NdarrayOrTensor],
        randomize: bool = True,
        *,
        params: DeformationParams | None = None,
        field: Tensor | None = None,
    ) -> dict[Any, NdarrayOrTensor]:
        """Deform all keys of a sample by one field.

        Args:
            data: a dictionary with ``(C, *S)`` values at the keys, and points and boxes at theirs.
            randomize: False replays the last draw.
            params: replays a record instead.
            field: applies this field ``(D, *S)`` in voxels instead.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key is.
            TypeError: a value is not an array or tensor of a real numeric type.
            ValueError: anything that does not fit; see "Inputs and answers" in the documentation.
        """
        valid = self.validate(data)
        seed_value = None if self.seed_key is None else valid.data[self.seed_key]
        found = self.deformation(valid.images[0], valid.spacings[0], randomize, params, field, seed_value)
        self.last = found  # threads may share this transform, and with it ``last``
        return self.apply(valid, [found])


RandDRDMDeformD = RandDRDMDeformDict = RandDRDMDeformd
