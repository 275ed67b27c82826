"""What must import where PEFT and transformers are absent or old."""

import subprocess
import sys


def test_function_and_settings_import_without_peft_and_transformers():
    code = """
import sys
for name in ("peft", "transformers", "accelerate", "datasets"):
    sys.modules[name] = None
import sparse_ft.lora
import sparse_ft.lora.function
from sparse_ft.lora import LoraSettings
print(LoraSettings().lora_r)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.strip() == "16", run.stderr
