"""PEFT adapter folders: read, judged, merged, inspected, written."""
