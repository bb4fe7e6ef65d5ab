#include "safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "files.hpp"

namespace megalodon::detail {

namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation

const std::map<std::string, DType>& dtypes() {
    static const std::map<std::string, DType> table = {
        {"F32", DType::float32}, {"F16", DType::float16}, {"BF16", DType::bfloat16}, {"F8_E4M3", DType::float8_e4m3},
        {"I8", DType::int8},     {"U8", DType::uint8},    {"I64", DType::int64},     {"U64", DType::uint64},
    };
    return table;
}

std::string code_of(DType dtype) {
    for (const auto& [code, value] : dtypes()) {
        if (value == dtype) return code;
    }
    throw Error(ErrorKind::internal, "Bug: an element type without a code");
}

struct Malformed {
    std::string what;
};

std::uint64_t little_endian(const std::byte* bytes) {
    std::uint64_t value = 0;
    for (std::size_t index = kLengthBytes; index-- > 0;)
        value = value << 8 | std::to_integer<std::uint64_t>(bytes[index]);
    return value;
}

// Bytes of a tensor; at most `limit`, so that no product overflows.
std::uint64_t checked_bytes(const Shape& shape, DType dtype, std::uint64_t limit, const std::string& name) {
    std::uint64_t bytes = byte_size(dtype);
    for (const std::int64_t axis : shape) {
        if (axis == 0) return 0;
    }
    for (const std::int64_t axis : shape) {
        if (axis < 0 || static_cast<std::uint64_t>(axis) > limit / bytes)
            throw Malformed{name + " is larger than the file"};
        bytes *= static_cast<std::uint64_t>(axis);
    }
    return bytes;
}

HostTensor read_tensor(const std::string& name, const Json& entry, const std::byte* data, std::uint64_t data_bytes) {
    const auto found = dtypes().find(entry.at("dtype").get<std::string>());
    if (found == dtypes().end()) throw Malformed{name + " has an unknown dtype"};
    HostTensor tensor{found->second, entry.at("shape").get<Shape>(), {}};
    const Json& offsets = entry.at("data_offsets");
    const auto begin = offsets.at(0).get<std::uint64_t>();
    const auto end = offsets.at(1).get<std::uint64_t>();
    if (begin > end || end > data_bytes) throw Malformed{name + " lies outside the file"};
    if (end - begin != checked_bytes(tensor.shape, tensor.dtype, data_bytes, name)) {
        throw Malformed{name + " has another size than its shape"};
    }
    if (end > begin) tensor.data.assign(data + begin, data + end);
    return tensor;
}

SafetensorsFile parse(const MappedFile& file) {
    if (file.size() < kLengthBytes) throw Malformed{"it has no header"};
    const std::uint64_t header_bytes = little_endian(file.data());
    if (header_bytes > kMaxHeaderBytes || header_bytes > file.size() - kLengthBytes) {
        throw Malformed{"its header is longer than the file"};
    }
    const char* text = reinterpret_cast<const char*>(file.data()) + kLengthBytes;
    const Json header = Json::parse(text, text + header_bytes);
    if (!header.is_object()) throw Malformed{"its header is no object"};
    const std::byte* data = file.data() + kLengthBytes + header_bytes;
    const std::uint64_t data_bytes = file.size() - kLengthBytes - header_bytes;
    SafetensorsFile result;
    std::uint64_t used = 0;
    for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") {
            result.metadata = entry.get<std::map<std::string, std::string>>();
            continue;
        }
        result.tensors[name] = read_tensor(name, entry, data, data_bytes);
        used += result.tensors[name].data.size();
    }
    if (used != data_bytes) throw Malformed{"its tensors are not as long as the file"};
    return result;
}

// The order of the reference implementation: wide elements first, so that every tensor is aligned, then by name.
std::vector<const TensorMap::value_type*> in_file_order(const TensorMap& tensors) {
    std::vector<const TensorMap::value_type*> order;
    for (const DType dtype : {DType::uint64, DType::int64, DType::float32, DType::bfloat16, DType::float16,
                              DType::float8_e4m3, DType::int8, DType::uint8}) {
        for (const auto& entry : tensors) {
            if (entry.second.dtype == dtype) order.push_back(&entry);
        }
    }
    return order;
}

}  // namespace

SafetensorsFile read_safetensors(const std::filesystem::path& path) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) {
        throw Error(ErrorKind::state, path.string() + ": there is no such file");
    }
    std::string what;
    try {
        return parse(MappedFile(path));
    } catch (const Malformed& malformed) {
        what = malformed.what;
    } catch (const Json::exception& exception) {
        what = exception.what();
    }
    throw Error(ErrorKind::state,
                path.string() + ": not a whole safetensors file (" + what + "); save the stream again");
}

void write_safetensors(const std::filesystem::path& path, const SafetensorsFile& file) {
    const auto order = in_file_order(file.tensors);
    Json header = Json::object();
    header["__metadata__"] = file.metadata;
    std::uint64_t offset = 0;
    for (const auto* entry : order) {
        const HostTensor& tensor = entry->second;
        const std::uint64_t end = offset + tensor.data.size();
        header[entry->first] = {
            {"dtype", code_of(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
        offset = end;
    }
    std::string text = header.dump();
    text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');
    unsigned char length[kLengthBytes];
    for (std::size_t index = 0; index < kLengthBytes; ++index) {
        length[index] = static_cast<unsigned char>(text.size() >> (8 * index));
    }
    write_atomically(path, [&](const Append& append) {
        append(length, sizeof length);
        append(text.data(), text.size());
        for (const auto* entry : order)
            append(entry->second.data.data(), entry->second.data.size());
    });
}

}  // namespace megalodon::detail
