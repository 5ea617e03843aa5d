// A libcuda.so.1 without a GPU, so that the launcher's way through cuda.bindings can be tested byte by byte.
// It has one device, keeps nothing, runs nothing, and writes a line to $FAKE_CUDA_LOG for every call that changes
// something. The environment says what it plays:
//   FAKE_CUDA_CAPABILITY "9.0"           the device's compute capability
//   FAKE_CUDA_VERSION "13000"            the driver's version
//   FAKE_CUDA_FAIL "cuLaunchKernelEx=700"  the call that fails, and with what
//   FAKE_CUDA_HANG "cuInit"              the call that never returns
//   FAKE_CUDA_PARAM_SIZES "8,4"          sizes of the arguments of the launches, to log their bytes
#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static std::string env(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static void log(const std::string &line) {
    if (FILE *f = fopen(env("FAKE_CUDA_LOG").c_str(), "a")) {
        fprintf(f, "%s\n", line.c_str());
        fclose(f);
    }
}

static CUresult result(const char *name) {
    if (env("FAKE_CUDA_HANG") == name)
        for (;;) pause();
    std::string fail = env("FAKE_CUDA_FAIL"), key = std::string(name) + "=";
    return fail.rfind(key, 0) == 0 ? static_cast<CUresult>(atoi(fail.c_str() + key.size())) : CUDA_SUCCESS;
}

static std::string hex(const void *data, size_t n) {
    std::string text;
    char digits[3];
    for (size_t i = 0; i < n; ++i) {
        snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char *>(data)[i]);
        text += digits;
    }
    return text;
}

// A stream, an event or a graph is a number, counted up.
template <class T>
static CUresult made(const char *name, T *handle) {
    static size_t n = 0;
    *handle = reinterpret_cast<T>(0xe00 + ++n);
    return log(name), result(name);
}

static std::string number(const void *handle) {
    char text[20];
    snprintf(text, sizeof text, " %zx", reinterpret_cast<size_t>(handle));
    return text;
}

extern "C" {

CUresult cuInit(unsigned) { return result("cuInit"); }

CUresult cuDriverGetVersion(int *version) {
    std::string wanted = env("FAKE_CUDA_VERSION");
    *version = wanted.empty() ? 13000 : atoi(wanted.c_str());
    return result("cuDriverGetVersion");
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char **text) {
    *text = "text of the driver";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *n) { return *n = 1, result("cuDeviceGetCount"); }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, result("cuDeviceGet"); }
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice) { return *bytes = 100000000000, CUDA_SUCCESS; }

CUresult cuDeviceGetName(char *name, int size, CUdevice) {
    snprintf(name, size, "Fake GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    std::string capability = env("FAKE_CUDA_CAPABILITY");
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = atoi(capability.c_str()); break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = atoi(capability.substr(capability.find('.') + 1).c_str());
            break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return result("cuDeviceGetAttribute");
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
    *context = reinterpret_cast<CUcontext>(0xc0);
    return result("cuDevicePrimaryCtxRetain");
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) { return result("cuDevicePrimaryCtxRelease"); }

CUresult cuCtxPushCurrent(CUcontext context) {
    log(context == reinterpret_cast<CUcontext>(0xc0) ? "push" : "push of another context");
    return result("cuCtxPushCurrent");
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    log("pop");
    *context = reinterpret_cast<CUcontext>(0xc0);
    return result("cuCtxPopCurrent");
}

CUresult cuMemGetInfo(size_t *free, size_t *total) {
    *free = 60000000000, *total = 100000000000;
    return result("cuMemGetInfo");
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    log("load " + hex(image, 4));
    *module = reinterpret_cast<CUmodule>(0xa0);
    return result("cuModuleLoadData");
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    log(std::string("function ") + name);
    *function = reinterpret_cast<CUfunction>(0xf0);
    return result("cuModuleGetFunction");
}

CUresult cuFuncLoad(CUfunction) { return log("load function"), result("cuFuncLoad"); }

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
    log("attribute " + std::to_string(attribute) + " " + std::to_string(value));
    return result("cuFuncSetAttribute");
}

CUresult cuStreamSynchronize(CUstream) { return log("synchronize"), result("cuStreamSynchronize"); }

CUresult cuStreamCreate(CUstream *stream, unsigned) { return made("cuStreamCreate", stream); }
CUresult cuStreamDestroy(CUstream) { return log("cuStreamDestroy"), CUDA_SUCCESS; }

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    return log("begin capture" + number(stream) + " mode " + std::to_string(mode)), result("cuStreamBeginCapture");
}

CUresult cuStreamEndCapture(CUstream, CUgraph *graph) {
    log("end capture");
    *graph = reinterpret_cast<CUgraph>(0x91);
    return result("cuStreamEndCapture");
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph, unsigned long long) {
    return made("cuGraphInstantiate", exec);
}

CUresult cuGraphDestroy(CUgraph) { return log("cuGraphDestroy"), CUDA_SUCCESS; }
CUresult cuGraphExecDestroy(CUgraphExec) { return log("cuGraphExecDestroy"), CUDA_SUCCESS; }
CUresult cuGraphUpload(CUgraphExec, CUstream) { return log("cuGraphUpload"), result("cuGraphUpload"); }

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    return log("graph" + number(exec) + " stream" + number(stream)), result("cuGraphLaunch");
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
    return made(("cuEventCreate " + std::to_string(flags)).c_str(), event);
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    return log("event" + number(event) + " stream" + number(stream)), result("cuEventRecord");
}

CUresult cuEventSynchronize(CUevent event) { return log("wait for event" + number(event)), result("cuEventSynchronize"); }

CUresult cuEventElapsedTime(float *ms, CUevent, CUevent) {
    *ms = 2.5f;
    return result("cuEventElapsedTime");
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t n, CUstream stream) {
    memcpy(to, reinterpret_cast<const void *>(from), n);  // "device" memory is the host's here
    return log("copy " + std::to_string(n) + " stream" + number(stream)), result("cuMemcpyDtoHAsync");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction, void **params, void **extra) {
    char head[200];
    snprintf(head, sizeof head, "launch grid %u %u %u block %u %u %u shared %u stream %zx extra %d params", c->gridDimX,
             c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
             reinterpret_cast<size_t>(c->hStream), extra != nullptr);
    std::string line = head, sizes = env("FAKE_CUDA_PARAM_SIZES");
    for (char *at = sizes.data(); params && *at; ++params) {
        line += " " + hex(*params, strtoul(at, &at, 10));
        if (*at == ',') ++at;
    }
    for (unsigned i = 0; i < c->numAttrs; ++i) {
        const CUlaunchAttribute &a = c->attrs[i];
        if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            line += " cluster " + std::to_string(a.value.clusterDim.x) + " " + std::to_string(a.value.clusterDim.y) +
                    " " + std::to_string(a.value.clusterDim.z);
        else if (a.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            line += " pdl " + std::to_string(a.value.programmaticStreamSerializationAllowed);
        else
            line += " unknown attribute";
    }
    log(line);
    return result("cuLaunchKernelEx");
}

// NVRTC 13.0 looks into a libcuda that is there for a table of optional functions, which begins with its size in bytes.
CUresult cuGetExportTable(const void **table, const CUuuid *) {
    static const size_t empty = sizeof(size_t);
    *table = &empty;
    return CUDA_SUCCESS;
}

// cuda.bindings asks for names without a version suffix; the exported ones carry those that cuda.h gives them.
CUresult cuGetProcAddress(const char *name, void **address, int, cuuint64_t, CUdriverProcAddressQueryResult *status) {
    *address = nullptr;
    for (const char *suffix : {"_v3", "_v2", "", "WithFlags"})
        if (!*address) *address = dlsym(RTLD_DEFAULT, (std::string(name) + suffix).c_str());
    Dl_info info;
    if (*address && dladdr(*address, &info) && !strstr(info.dli_fname, "libcuda.so.1")) *address = nullptr;
    if (status) *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
}
