"""C++ and CUDA files, compiled at first use and called through ctypes. No setup, no CUDA_HOME.

    call = compile_cpu(path, *includes)             by g++
    call("function", tensor, 3)
    code = compile_cuda("name", source, (8, 0))     by NVRTC, the run-time compiler that torch ships
    launch = load_cuda(0, code)                     on GPU 0
    launch("kernel", (B, H, W), tensor, 3)

OSError or RuntimeError where there is no compiler, or it does not like the source.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def to_c(value):
    """A whole number as a C int, a tensor or None as a pointer."""
    if isinstance(value, int):
        return ctypes.c_int(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def check(status, what):
    """NVRTC and the CUDA driver return 0 if all is well."""
    if status:
        raise RuntimeError(f"{what} failed with error {status}")


# --------------------------------------------------------------------------------------------------
# For the CPU


def compile_cpu(path, *includes):
    """A C++ file, and what it includes, through g++ into a shared library in the user's cache.

      ->  call(function, *arguments)
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("there is no C++ compiler (g++)")
    # No -march=native: machines with different processors may share a home directory.
    command = [compiler, "-O3", "-std=c++14", "-shared", "-fPIC", "-pthread", "-w"]

    # The library is named by its source, so that another version of it is another file.
    texts = [file.read_text("utf-8") for file in (path, *includes)]
    key = " ".join([sys.platform, platform.machine(), *command, *texts])
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"

    def build(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / name
        if not library.exists():
            # Compiled under another name, then renamed: other processes see all of it or nothing.
            with tempfile.TemporaryDirectory(dir=folder) as part:
                run = [*command, str(path), "-o", f"{part}/part.so"]
                result = subprocess.run(run, capture_output=True, text=True)
                if result.returncode:
                    raise RuntimeError(f"{compiler} failed: {result.stderr.strip()[:500]}")
                os.replace(f"{part}/part.so", library)
        return ctypes.CDLL(str(library))

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        library = build(cache / "photo-editing")
    except (OSError, RuntimeError):
        # No home, no room, a file system that runs nothing: for this process only, then.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            library = build(Path(scratch))
    return lambda function, *args: library[function](*map(to_c, args))


# --------------------------------------------------------------------------------------------------
# For a GPU


def find_nvrtc():
    """torch is linked to NVRTC through a library of its own, in which NVRTC's symbols are found."""
    major = (torch.version.cuda or "none").split(".")[0]
    own = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    for name in (own, f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll"):
        try:
            library = ctypes.CDLL(str(name))
            if hasattr(library, "nvrtcCreateProgram"):
                return library
        except OSError:
            continue
    raise OSError("this torch comes without NVRTC, the run-time compiler for CUDA")


def compile_cuda(name, source, capability):
    """CUDA text through NVRTC -> machine code (bytes) for GPUs of a capability, (8, 0) for an A100.

    Not torch.cuda._compile_kernel, which is private, new, and asks for CUDA_HOME.
    """
    nvrtc = find_nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text, file = source.encode(), f"{name}.cu".encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, file, 0, None, None), "NVRTC")
    try:
        option = ctypes.c_char_p("--gpu-architecture=sm_{}{}".format(*capability).encode())
        status = nvrtc.nvrtcCompileProgram(program, 1, ctypes.byref(option))
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            nvrtc.nvrtcGetProgramLog(program, log)
            log = log.value.decode(errors="replace").strip()[:500]
            check(status, f"NVRTC ({option.value.decode()}: {log})")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def load_cuda(index, code):
    """Machine code -> launch(name, (B, H, W), *arguments): a thread per pixel, torch's stream."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    context, module = ctypes.c_void_p(), ctypes.c_void_p()
    functions = {}
    retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index)  # torch's own
    check(retained, "cuDevicePrimaryCtxRetain")
    with torch.cuda.device(index):
        check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")

    def launch(name, shape, *args):
        if name not in functions:
            functions[name] = ctypes.c_void_p()
            found = ctypes.byref(functions[name])
            check(driver.cuModuleGetFunction(found, module, name.encode()), name)
        B, H, W = shape
        size = (W + 127) // 128, min(H, 65535), B, 128, 1, 1  # of the grid, then of a block
        values = [to_c(value) for value in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        with torch.cuda.device(index):
            # Autograd's own threads may not have a context yet.
            check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
            stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
            launched = driver.cuLaunchKernel(functions[name], *size, 0, stream, pointers, None)
            check(launched, f"launching {name}")

    return launch
