"""C++ and CUDA source, a string, compiled at first use and called through ctypes. No setup, no CUDA_HOME.

    call = compile_cpu("name", source)              by g++
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


def c_arguments(values):
    """Numbers as C ints, tensors and None as pointers."""
    return [ctypes.c_int(v) if isinstance(v, int) else ctypes.c_void_p(None if v is None else v.data_ptr())
            for v in values]


def check(status, what):
    """NVRTC and the CUDA driver return 0 if all is well."""
    if status:
        raise RuntimeError(f"{what} failed with error {status}")


def compile_cpu(name, source):
    """C++ through g++ into a shared library in the user's cache, called by its name and content.

      ->  call(function, *arguments)
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("there is no C++ compiler (g++)")
    # No -march=native: machines with different processors may share a home directory.
    command = [compiler, "-O3", "-std=c++14", "-shared", "-fPIC", "-pthread", "-w", "-x", "c++", "-", "-o"]
    key = hashlib.sha256(" ".join([sys.platform, platform.machine(), *command, source]).encode()).hexdigest()[:16]

    def build(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{name}-{key}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as part:  # then renamed: others see all of it or nothing
                result = subprocess.run([*command, f"{part}/part.so"], input=source, capture_output=True, text=True)
                if result.returncode:
                    raise RuntimeError(f"{compiler} failed: {result.stderr.strip()[:500]}")
                os.replace(f"{part}/part.so", path)
        return ctypes.CDLL(str(path))

    try:
        library = build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "photo-editing")
    except (OSError, RuntimeError):  # no home, no room, a file system that runs nothing: for this process only, then
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            library = build(Path(scratch))
    return lambda function, *args: library[function](*c_arguments(args))


def find_nvrtc():
    """torch is linked to NVRTC through a library of its own, whose symbols, looked up by name, include NVRTC's."""
    major, folder = (torch.version.cuda or "none").split(".")[0], Path(torch.__file__).parent / "lib"
    for name in (folder / "libcaffe2_nvrtc.so", f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll"):
        try:
            library = ctypes.CDLL(str(name))
            if hasattr(library, "nvrtcCreateProgram"):
                return library
        except OSError:
            continue
    raise OSError("this torch comes without NVRTC, the run-time compiler for CUDA")


def compile_cuda(name, source, capability):
    """CUDA through NVRTC -> machine code (bytes) for GPUs of that compute capability, (8, 0) for an A100.

    Not torch.cuda._compile_kernel, which is private, new, and asks for CUDA_HOME.
    """
    nvrtc, program, size = find_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    file = f"{name}.cu".encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), file, 0, None, None), "NVRTC")
    try:
        option = ctypes.c_char_p("--gpu-architecture=sm_{}{}".format(*capability).encode())
        if status := nvrtc.nvrtcCompileProgram(program, 1, ctypes.byref(option)):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            nvrtc.nvrtcGetProgramLog(program, log)
            check(status, f"NVRTC ({option.value.decode()}: {log.value.decode(errors='replace').strip()[:500]})")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def load_cuda(index, code):
    """Machine code -> launch(name, (B, H, W), *arguments): one thread per pixel, on torch's current stream."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    context, module, functions = ctypes.c_void_p(), ctypes.c_void_p(), {}
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index), "cuDevicePrimaryCtxRetain")  # torch's own
    with torch.cuda.device(index):
        check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")

    def launch(name, shape, *args):
        B, H, W = shape
        grid, block = ((W + 127) // 128, min(H, 65535), B), (128, 1, 1)
        if name not in functions:
            functions[name] = ctypes.c_void_p()
            check(driver.cuModuleGetFunction(ctypes.byref(functions[name]), module, name.encode()), name)
        values = c_arguments(args)
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        with torch.cuda.device(index):
            check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")  # autograd's own threads may not have one yet
            stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
            check(driver.cuLaunchKernel(functions[name], *grid, *block, 0, stream, pointers, None), f"launching {name}")

    return launch
