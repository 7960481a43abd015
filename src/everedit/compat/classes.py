"""A class of hyper-parameters for each algorithm, under the name that EasyEdit gives it where it has one."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import Self

from everedit.compat.hparams import HyperParams, merged
from everedit.compat.tables import ALGORITHMS, algorithm_called
from everedit.errors import EditError
from everedit.experiments.config import RunConfig

__all__ = [
    "CLASSES", "AlphaEditHyperParams", "CaliNetHyperParams", "EMMETHyperParams", "FTHyperParams",
    "GraceHyperParams", "IKEHyperParams", "KEHyperParams", "KETrainingHparams", "KNHyperParams",
    "LoRAHyperParams", "MALMENHyperParams", "MALMENTrainingHparams", "MEMITHyperParams", "MEMOIRHyperParams",
    "MENDHyperParams", "MENDTrainingHparams", "PMETHyperParams", "RLSEditHyperParams", "ROMEHyperParams",
    "R_ROMEHyperParams", "SERACHparams", "SERACTrainingHparams", "SimIEHyperParams", "TPatcherHyperParams",
    "UltraEditHyperParams", "WISEHyperParams", "WilKEHyperParams", "hparams_class",
]  # fmt: skip


class FTHyperParams(HyperParams):
    """FT, FT-L and FT-M: the objective and the constraint tell them apart."""

    algorithm = ALGORITHMS["FT"]


class LoRAHyperParams(HyperParams):
    """LoRA."""

    algorithm = ALGORITHMS["LoRA"]


class UltraEditHyperParams(HyperParams):
    """UltraEdit."""

    algorithm = ALGORITHMS["UltraEdit"]


class ROMEHyperParams(HyperParams):
    """ROME."""

    algorithm = ALGORITHMS["ROME"]


class R_ROMEHyperParams(HyperParams):
    """R-ROME."""

    algorithm = ALGORITHMS["R-ROME"]


class WilKEHyperParams(HyperParams):
    """WilKE, whose own code calls them so."""

    algorithm = ALGORITHMS["WilKE"]


class MEMITHyperParams(HyperParams):
    """MEMIT."""

    algorithm = ALGORITHMS["MEMIT"]


class PMETHyperParams(HyperParams):
    """PMET."""

    algorithm = ALGORITHMS["PMET"]


class EMMETHyperParams(HyperParams):
    """EMMET."""

    algorithm = ALGORITHMS["EMMET"]


class AlphaEditHyperParams(HyperParams):
    """AlphaEdit."""

    algorithm = ALGORITHMS["AlphaEdit"]


class RLSEditHyperParams(HyperParams):
    """RLSEdit, which EasyEdit does not have."""

    algorithm = ALGORITHMS["RLSEdit"]


class KNHyperParams(HyperParams):
    """KN."""

    algorithm = ALGORITHMS["KN"]


class GraceHyperParams(HyperParams):
    """GRACE."""

    algorithm = ALGORITHMS["GRACE"]


class WISEHyperParams(HyperParams):
    """WISE."""

    algorithm = ALGORITHMS["WISE"]


class IKEHyperParams(HyperParams):
    """IKE."""

    algorithm = ALGORITHMS["IKE"]


class MEMOIRHyperParams(HyperParams):
    """MEMOIR, which EasyEdit does not have."""

    algorithm = ALGORITHMS["MEMOIR"]


class TPatcherHyperParams(HyperParams):
    """T-Patcher, which EasyEdit does not have."""

    algorithm = ALGORITHMS["T-Patcher"]


class CaliNetHyperParams(HyperParams):
    """CaliNet, which EasyEdit does not have."""

    algorithm = ALGORITHMS["CaliNet"]


class MENDHyperParams(HyperParams):
    """MEND, as it edits."""

    algorithm = ALGORITHMS["MEND"]


class MALMENHyperParams(HyperParams):
    """MALMEN, as it edits."""

    algorithm = ALGORITHMS["MALMEN"]


class KEHyperParams(HyperParams):
    """KE, as it edits."""

    algorithm = ALGORITHMS["KE"]


class SERACHparams(HyperParams):
    """SERAC, as it edits."""

    algorithm = ALGORITHMS["SERAC"]


class MENDTrainingHparams(MENDHyperParams):
    """MEND, as it is trained."""


class MALMENTrainingHparams(MALMENHyperParams):
    """MALMEN, as it is trained."""


class KETrainingHparams(KEHyperParams):
    """KE, as it is trained."""


class SERACTrainingHparams(SERACHparams):
    """SERAC, as it is trained."""


class SimIEHyperParams(HyperParams):
    """SimIE's hyper-parameters, with those of its base method as ``base_hparams``."""

    algorithm = ALGORITHMS["SimIE"]

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> Self:
        """Read SimIE's file, and its base method's, of the same name in the folder beside it."""
        found = super().from_hparams(hparams_name_or_path)
        base = hparams_class(str(found.to_dict().get("base_method", "ROME")))
        file = Path(hparams_name_or_path)
        found.base_hparams = base.from_hparams(file.parent.parent / base.algorithm.name / file.name)
        return found

    from_json = from_hparams

    def run_config(self) -> RunConfig:
        """Return the base method's config under the policy SimIE."""
        base = self.to_dict().get("base_hparams")
        if not isinstance(base, HyperParams):
            raise EditError(
                what="base_hparams, the hyper-parameters of the base method, are missing",
                where=type(self).__name__,
                fix="give those of another class, for example base_hparams=ROMEHyperParams.from_hparams(…)",
            )
        found = self.translation()
        values = base.run_config().model_dump(exclude_unset=True)
        values |= {place: found.settings[place] for place in ("model", "dtype") if place in found.settings}
        values |= {"policy": "simie", "policy_settings": found.under("policy")}
        return RunConfig.build(None, merged(values, self.own()), [])


CLASSES: tuple[type[HyperParams], ...] = (
    FTHyperParams, LoRAHyperParams, UltraEditHyperParams, ROMEHyperParams, R_ROMEHyperParams, WilKEHyperParams,
    MEMITHyperParams, PMETHyperParams, EMMETHyperParams, AlphaEditHyperParams, RLSEditHyperParams,
    KNHyperParams, GraceHyperParams, WISEHyperParams, IKEHyperParams, MEMOIRHyperParams, TPatcherHyperParams,
    CaliNetHyperParams, MENDHyperParams, MALMENHyperParams, KEHyperParams, SERACHparams, SimIEHyperParams,
)  # fmt: skip


def hparams_class(algorithm: str) -> type[HyperParams]:
    """Return the class for an algorithm (``alg_name``). Raises :class:`everedit.errors.UnknownName` with near names."""
    wanted = algorithm_called(algorithm)
    return next(kind for kind in CLASSES if kind.algorithm is wanted)
