"""Models by name, such as ``resnet50``, ``timm:resnet50d`` or ``my_module:build``; nothing is downloaded."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import device, nn

Builder = Callable[..., nn.Module]


class ModelError(Exception):
    """A model that cannot be had; its message is one sentence for a person."""


def build(name: str, arguments: Mapping[str, Any] | None = None, initialized: bool = False) -> nn.Module:
    """The model called ``name``, on the CPU.

    Args:
        name: a torchvision model such as ``resnet50``, one of a package in :data:`PACKAGES` such as
            ``timm:resnet50d``, or ``module:callable`` for a callable that returns a module.
        arguments: further arguments of its builder; of the configuration for a model of transformers.
        initialized: whether weights and buffers have their initial values. In most cases they have none otherwise.

    Raises:
        ModelError: there is no such model, its package is not installed, or it cannot be built.
    """
    builder = _builder(name)
    arguments = dict(arguments or {})
    try:
        try:
            # Neither time nor memory for weights that nobody reads.
            with device("cpu" if initialized else "meta"):
                model = builder(**arguments)
        except Exception:
            # Constructors that look at values need real ones.
            model = builder(**arguments)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} could not be built: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, which is no torch.nn.Module.")
    return model.to_empty(device="cpu") if any(p.is_meta for p in model.parameters()) else model


def torchvision_builder(name: str) -> Builder:
    """torchvision's builder of the model called ``name``, bound to random weights: nothing is downloaded.

    Raises:
        ModelError: torchvision is not installed, or has no such model.
    """
    models = _import("torchvision", name).models
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        otherwise = "give module:callable for a model of your own"
        raise _unknown("torchvision", name.lower(), models.list_models(), otherwise, shown=name) from error
    arguments = [key for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters]
    return lambda **more: builder(**dict.fromkeys(arguments), **more)


def _timm(name: str) -> Builder:
    timm = _import("timm", name)
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models(), "timm.list_models() has them all")
    return lambda **more: timm.create_model(name, pretrained=False, **more)


def _transformers(name: str) -> Builder:
    transformers = _import("transformers", name)
    model_class = getattr(transformers, name, None)
    config_class = getattr(model_class, "config_class", None)
    if config_class is None or not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        raise _unknown("transformers", name, dir(transformers), "give the class of a model with a configuration")
    return lambda **config: model_class(config_class(**config))


def _smp(name: str) -> Builder:
    smp = _import("smp", name)
    architecture, _, encoder = name.partition("/")
    model_class = getattr(smp, architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        names = [key for key, value in vars(smp).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        raise _unknown("smp", architecture, names, f"it has {', '.join(sorted(names))}")
    # Encoders of timm, tu-NAME, are not in the list, and smp says itself where there is none.
    if encoder and not encoder.startswith("tu-") and encoder not in smp.encoders.get_encoder_names():
        raise _unknown("smp", encoder, smp.encoders.get_encoder_names(), "tu-NAME is an encoder of timm", "encoder")
    arguments = {"encoder_name": encoder} if encoder else {}
    return lambda **more: model_class(**{**arguments, "encoder_weights": None, **more})


# Arguments of monai's networks that have such a parameter: in any case, and where it is required.
_MONAI_ARGUMENTS = {"spatial_dims": 2, "n_input_channels": 3, "pretrained": False}
_MONAI_REQUIRED = {"in_channels": 3, "out_channels": 2, "channels": (16, 32, 64), "strides": (2, 2)}


def _monai(name: str) -> Builder:
    nets = importlib.import_module(".networks.nets", _import("monai", name).__name__)
    builder = getattr(nets, name, None)
    if not callable(builder):
        names = [key for key, value in vars(nets).items() if callable(value)]
        raise _unknown("monai", name, names, "give the name of a callable in monai.networks.nets")
    parameters = _parameters(builder, nets)
    arguments = {key: value for key, value in _MONAI_ARGUMENTS.items() if key in parameters}
    for key, value in _MONAI_REQUIRED.items():
        if key in parameters and parameters[key].default is inspect.Parameter.empty:
            arguments[key] = value
    return lambda **more: builder(**{**arguments, **more})


def _parameters(builder: Builder, module: ModuleType) -> dict[str, inspect.Parameter]:
    """The parameters of a class or function, and of what gets its ``**kwargs``: a base class, or what it returns."""
    signature = inspect.signature(builder)
    parameters = dict(signature.parameters)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        returned = signature.return_annotation
        further = builder.__base__ if isinstance(builder, type) else getattr(module, str(returned), returned)
        if isinstance(further, type) and issubclass(further, nn.Module) and further is not nn.Module:
            parameters = {**_parameters(further, module), **parameters}
    return parameters


@dataclasses.dataclass(frozen=True)
class Package:
    """Where the models of a prefix come from.

    Attributes:
        module: what is imported.
        pip: what pip installs for it.
        example: a name, with its prefix.
        builder: from a name without prefix to the callable that builds the model.
    """

    module: str
    pip: str
    example: str
    builder: Callable[[str], Builder]


PACKAGES = {
    "torchvision": Package("torchvision", "torchvision", "torchvision:resnet50", torchvision_builder),
    "timm": Package("timm", "timm", "timm:resnet50d", _timm),
    "transformers": Package("transformers", "transformers", "transformers:ResNetForImageClassification", _transformers),
    "smp": Package("segmentation_models_pytorch", "segmentation-models-pytorch", "smp:Unet/resnet34", _smp),
    "monai": Package("monai", "monai", "monai:resnet18", _monai),
}


def _builder(name: str) -> Builder:
    prefix, colon, rest = name.partition(":")
    if not colon:
        return torchvision_builder(name)
    return PACKAGES[prefix].builder(rest) if prefix in PACKAGES else _imported(name)


def _import(prefix: str, name: str) -> ModuleType:
    package = PACKAGES[prefix]
    try:
        return importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        if error.name != package.module:
            raise ModelError(f"{package.module}, for {name}, cannot be imported: {_one_line(error)}") from error
        raise ModelError(
            f"{name} is looked for in {package.module}, which is not installed: pip install {package.pip}"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{package.module}, for {name}, cannot be imported: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _unknown(
    prefix: str, name: str, names: Iterable[str], otherwise: str, what: str = "model", shown: str | None = None
) -> ModelError:
    close = difflib.get_close_matches(name, [other for other in names if other != name], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"{otherwise}."
    return ModelError(f"{PACKAGES[prefix].module} has no {what} called {(shown or name)!r}; {hint}")


def _imported(name: str) -> Builder:
    module_name, _, path = name.partition(":")
    try:
        member = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"module {module_name!r} cannot be imported: {type(error).__name__}: {_one_line(error)}"
        ) from error
    for part in path.split("."):
        if not hasattr(member, part):
            raise ModelError(f"module {module_name!r} has no {path!r}.")
        member = getattr(member, part)
    if not callable(member):
        raise ModelError(f"{name} is a {type(member).__name__}, which cannot be called to build a model.")
    return member


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
