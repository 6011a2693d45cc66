from .dropin.arrays import pack as pack
from .dropin.arrays import unpack as unpack
from .dropin.client_helpers import receive as receive
from .dropin.client_helpers import reply as reply
from .dropin.lora_strategy import LoraStrategy as LoraStrategy
from .dropin.strategies import BestRank as BestRank
from .dropin.strategies import FedExLora as FedExLora
from .dropin.strategies import FedIT as FedIT
from .dropin.strategies import FedRot as FedRot
from .dropin.strategies import FedSALora as FedSALora
from .dropin.strategies import FedSVD as FedSVD
from .dropin.strategies import FfaLora as FfaLora
from .dropin.strategies import FlexLora as FlexLora
from .dropin.strategies import Flora as Flora
from .dropin.strategies import FloraNA as FloraNA
from .dropin.strategies import Florist as Florist
from .dropin.strategies import HetLora as HetLora
from .dropin.strategies import LoraFair as LoraFair
from .dropin.strategies import Oracle as Oracle
from .dropin.strategies import RoLora as RoLora

def require_flwr() -> None: ...
