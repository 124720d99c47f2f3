"""A CUDA driver of three GPUs, built for the tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
/* Three GPUs whose 16 bytes are 1, 2 and 3; CUDA_VISIBLE_DEVICES picks by index or by the UUID's last digit. */
static int seen[3], count = -1;
int cuInit(unsigned flags) {
    char *given = getenv("CUDA_VISIBLE_DEVICES"), copy[256], *item;
    count = 0;
    if (!given) { for (; count < 3; count++) seen[count] = count + 1; return 0; }
    strncpy(copy, given, 255);
    for (item = strtok(copy, ","); item; item = strtok(NULL, ","))
        seen[count++] = strncmp(item, "GPU-", 4) ? atoi(item) + 1 : item[strlen(item) - 1] - '0';
    return 0;
}
int cuDeviceGetCount(int *result) { *result = count; return count < 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0, 16); uuid[15] = seen[device]; return 0; }
"""
UUIDS = {i: f"GPU-00000000-0000-0000-0000-00000000000{i + 1}" for i in range(3)}


def build(folder: Path) -> Path:
    """Make libcuda in a folder, for LD_LIBRARY_PATH; skips the test where there is no C compiler."""
    (folder / "cuda.c").write_text(SOURCE)
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler, to make a driver without a GPU")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    return folder
