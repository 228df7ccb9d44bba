"""The model as transformers knows it. Importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# where it is defined: from transformers' front door it needs torchvision before 5.18 or so, which registering does not
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ett.model.configuration import EttConfig
from ett.model.ett import EttForConditionalGeneration, EttOutput
from ett.model.processing import EttImageProcessor, EttProcessor
from ett.model.projector import Projector, ProjectorConfig

AutoConfig.register("ett", EttConfig, exist_ok=True)
AutoModelForImageTextToText.register(EttConfig, EttForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(EttConfig, slow_image_processor_class=EttImageProcessor, exist_ok=True)
AutoProcessor.register(EttConfig, EttProcessor, exist_ok=True)

__all__ = [
    "EttConfig",
    "EttForConditionalGeneration",
    "EttImageProcessor",
    "EttOutput",
    "EttProcessor",
    "Projector",
    "ProjectorConfig",
]
