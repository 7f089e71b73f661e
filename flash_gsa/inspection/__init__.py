"""What the slots of a trained model do on a text, as numbers and as pictures."""

from flash_gsa.inspection.page import save_page
from flash_gsa.inspection.pictures import save_picture
from flash_gsa.inspection.slots import SlotActivity, gsa_layers, slot_activities, slot_activity
from flash_gsa.inspection.token_text import IncrementalText, token_texts
from flash_gsa.inspection.usage import slot_usage

__all__ = [
    "IncrementalText",
    "SlotActivity",
    "gsa_layers",
    "save_page",
    "save_picture",
    "slot_activities",
    "slot_activity",
    "slot_usage",
    "token_texts",
]
