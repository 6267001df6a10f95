#include "addon/convert.hpp"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>

namespace vmigrate::addon {

namespace {

int hex_digit(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  return -1;
}

/// Parses exactly out.size() bytes. Only lower case is accepted, so that a value has one spelling.
bool parse_hex(std::string_view hex, std::span<uint8_t> out) {
  if (hex.size() != out.size() * 2) return false;
  for (size_t i = 0; i < out.size(); i++) {
    const int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    out[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return true;
}

uint64_t big_endian(std::span<const uint8_t> bytes) {
  uint64_t value = 0;
  for (const uint8_t byte : bytes) value = value << 8 | byte;
  return value;
}

template <typename Convert>
auto each(const Napi::Object& object, const char* name, Convert convert) {
  const Napi::Array array = object.Get(name).As<Napi::Array>();
  std::vector<decltype(convert(Napi::Object()))> out;
  for (uint32_t i = 0; i < array.Length(); i++) out.push_back(convert(array.Get(i).As<Napi::Object>()));
  return out;
}

}  // namespace

Napi::Object error_object(Napi::Env env, const Error& error) {
  Napi::Object object = Napi::Error::New(env, error.what).Value();
  object.Set("nativeCode", static_cast<double>(error.code));
  object.Set("errno", error.system_errno);
  return object;
}

void throw_error(Napi::Env env, const Error& error) {
  napi_throw(env, error_object(env, error));
}

Napi::Value failure_object(Napi::Env env, const std::optional<Error>& failure) {
  if (!failure) return env.Null();
  Napi::Object object = Napi::Object::New(env);
  object.Set("code", static_cast<double>(failure->code));
  object.Set("errno", failure->system_errno);
  object.Set("what", failure->what);
  return object;
}

std::string text(const Napi::Object& object, const char* name) {
  return object.Get(name).As<Napi::String>().Utf8Value();
}

double number(const Napi::Object& object, const char* name) {
  return object.Get(name).As<Napi::Number>().DoubleValue();
}

uint64_t u64(const Napi::Object& object, const char* name) {
  bool is_lossless = false;
  return object.Get(name).As<Napi::BigInt>().Uint64Value(&is_lossless);
}

bool flag(const Napi::Object& object, const char* name) {
  return object.Get(name).As<Napi::Boolean>().Value();
}

/// Returns false if the property is missing.
bool optional_flag(const Napi::Object& object, const char* name) {
  return object.Get(name).ToBoolean().Value();
}

Napi::Value bigint(Napi::Env env, uint64_t value) {
  return Napi::BigInt::New(env, value);
}

Napi::Value counters_array(Napi::Env env, std::span<const uint64_t> counters) {
  Napi::BigUint64Array array = Napi::BigUint64Array::New(env, counters.size());
  for (size_t i = 0; i < counters.size(); i++) array[i] = counters[i];
  return array;
}

std::vector<pager::RegionFileConfig> region_files(const Napi::Object& options, const char* name) {
  return each(options, name, [](const Napi::Object& region) {
    return pager::RegionFileConfig{text(region, "path"), u64(region, "lengthBytes"),
                                   static_cast<uint64_t>(number(region, "pageBytes")),
                                   optional_flag(region, "isPrivate")};
  });
}

std::vector<pager::SourceRegionConfig> source_regions(const Napi::Object& options) {
  return each(options, "regions", [](const Napi::Object& region) {
    return pager::SourceRegionConfig{text(region, "path"), u64(region, "lengthBytes"),
                                     static_cast<uint64_t>(number(region, "pageBytes"))};
  });
}

std::optional<pager::SourceCloneConfig> source_clone(const Napi::Object& options) {
  if (!options.Get("clone").IsObject()) return std::nullopt;
  const Napi::Object clone = options.Get("clone").As<Napi::Object>();
  pager::SourceCloneConfig config;
  config.resume = flag(clone, "isResume");
  config.own_paths = texts(clone, "ownPaths");
  return config;
}

std::vector<pager::TargetRegionConfig> target_regions(const Napi::Object& options, const char* name) {
  return each(options, name, [](const Napi::Object& region) {
    return pager::TargetRegionConfig{text(region, "path"), text(region, "presencePath"),
                                     u64(region, "lengthBytes"),
                                     static_cast<uint64_t>(number(region, "pageBytes"))};
  });
}

std::vector<std::string> texts(const Napi::Object& object, const char* name) {
  std::vector<std::string> all;
  const Napi::Array array = object.Get(name).As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++) all.push_back(array.Get(i).As<Napi::String>().Utf8Value());
  return all;
}

Result<memory::TagKey> tag_key(const std::string& hex) {
  memory::TagKey key;
  if (!parse_hex(hex, key))
    return Error{ErrorCode::kInvalidArgument, 0, "key of tags is not hex of its length"};
  return key;
}

std::vector<pager::DigestRegionConfig> digest_regions(const Napi::Object& options, const char* name) {
  return each(options, name, [](const Napi::Object& region) {
    return pager::DigestRegionConfig{text(region, "path"), text(region, "digestPath"),
                                     u64(region, "lengthBytes"),
                                     static_cast<uint64_t>(number(region, "pageBytes"))};
  });
}

std::vector<uint32_t> cluster_order(const Napi::Value& value) {
  if (!value.IsTypedArray()) return {};
  const auto array = value.As<Napi::Uint32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

Napi::Value cluster_array(Napi::Env env, std::span<const uint32_t> order) {
  Napi::Uint32Array array = Napi::Uint32Array::New(env, order.size());
  std::copy(order.begin(), order.end(), array.Data());
  return array;
}

PageRun page_run(const Napi::CallbackInfo& info, size_t first_argument) {
  const auto integer = [&](size_t index) {
    return static_cast<uint64_t>(info[index].As<Napi::Number>().Int64Value());
  };
  return {PageIndex{integer(first_argument)}, integer(first_argument + 1)};
}

Result<const transport::Provider*> provider(const Napi::Object& place) {
  const transport::Provider* found = transport::find_provider(text(place, "provider"));
  if (found == nullptr) return Error{ErrorCode::kInvalidArgument, 0, "no such provider"};
  return found;
}

transport::Address address(const Napi::Object& place) {
  return {text(place, "host"), static_cast<uint16_t>(number(place, "port"))};
}

transport::Options provider_options(const Napi::Object& place) {
  transport::Options converted;
  if (!place.Get("options").IsObject()) return converted;
  const Napi::Object options = place.Get("options").As<Napi::Object>();
  const Napi::Array names = options.GetPropertyNames();
  for (uint32_t i = 0; i < names.Length(); i++) {
    const std::string name = names.Get(i).As<Napi::String>().Utf8Value();
    if (options.Get(name).IsNumber())
      converted.emplace(name, static_cast<uint64_t>(number(options, name.c_str())));
    else
      converted.emplace(name, text(options, name.c_str()));
  }
  return converted;
}

namespace {

Napi::Array strings(Napi::Env env, const std::vector<std::string>& values) {
  Napi::Array array = Napi::Array::New(env, values.size());
  for (uint32_t i = 0; i < values.size(); i++) array.Set(i, values[i]);
  return array;
}

}  // namespace

Napi::Value devices_array(Napi::Env env, const std::vector<transport::Device>& devices) {
  Napi::Array array = Napi::Array::New(env, devices.size());
  for (uint32_t i = 0; i < devices.size(); i++) {
    Napi::Array ports = Napi::Array::New(env, devices[i].ports.size());
    for (uint32_t j = 0; j < devices[i].ports.size(); j++) {
      const transport::DevicePort& port = devices[i].ports[j];
      Napi::Object entry = Napi::Object::New(env);
      entry.Set("number", port.number);
      entry.Set("isActive", port.active);
      entry.Set("state", port.state);
      entry.Set("linkLayer", port.link_layer);
      entry.Set("mtuBytes", port.mtu_bytes);
      entry.Set("gids", strings(env, port.gids));
      entry.Set("addresses", strings(env, port.addresses));
      ports.Set(j, entry);
    }
    Napi::Object device = Napi::Object::New(env);
    device.Set("name", devices[i].name);
    device.Set("isOnDemandPaging", devices[i].on_demand_paging);
    device.Set("ports", ports);
    array.Set(i, device);
  }
  return array;
}

Result<transport::Credentials> credentials(const Napi::Object& options) {
  transport::Credentials parsed;
  if (!parse_hex(text(options, "session"), parsed.session))
    return Error{ErrorCode::kInvalidArgument, 0, "session id is not hex of its length"};
  if (!parse_hex(text(options, "token"), parsed.token))
    return Error{ErrorCode::kInvalidArgument, 0, "session token is not hex of its length"};
  const std::string security =
      options.Get("dataSecurity").IsString() ? text(options, "dataSecurity") : "integrity";
  if (security != "none" && security != "integrity" && security != "encrypt")
    return Error{ErrorCode::kInvalidArgument, 0, "this build has no such security of data connections"};
  parsed.security = security == "none"        ? transport::Security::kNone
                    : security == "integrity" ? transport::Security::kIntegrity
                                              : transport::Security::kEncrypt;
  parsed.old_hello = options.Get("isOldHello").ToBoolean();
  return parsed;
}

Result<multicast::Group> multicast_group(const Napi::Object& options) {
  multicast::Group group;
  uint8_t session[8];
  if (!parse_hex(text(options, "key"), group.key) || !parse_hex(text(options, "session"), session))
    return Error{ErrorCode::kInvalidArgument, 0, "key or session of a multicast is not hex of its length"};
  group.session = big_endian(session);
  group.provider = text(options, "provider");
  group.address = text(options, "group");
  group.port = static_cast<uint16_t>(number(options, "port"));
  if (options.Get("interfaceAddress").IsString()) group.interface_address = text(options, "interfaceAddress");
  group.ttl = static_cast<int>(number(options, "ttl"));
  group.mtu_bytes = static_cast<uint32_t>(number(options, "mtuBytes"));
  const char* merging = std::getenv("VMIGRATE_MULTICAST_GRO");
  group.merges_received = merging == nullptr || std::string_view(merging) != "off";
  return group;
}

std::string to_hex(const transport::RemoteKey& key) {
  char hex[49];
  std::snprintf(hex, sizeof hex, "%016" PRIx64 "%016" PRIx64 "%016" PRIx64, key.address, key.key,
                key.length_bytes);
  return hex;
}

Result<transport::RemoteKey> remote_key(const std::string& hex) {
  uint8_t bytes[24];
  if (!parse_hex(hex, bytes)) return Error{ErrorCode::kProtocol, 0, "remote key is not hex of its length"};
  const std::span<const uint8_t, 24> all(bytes);
  return transport::RemoteKey{big_endian(all.subspan<0, 8>()), big_endian(all.subspan<8, 8>()),
                              big_endian(all.subspan<16, 8>())};
}

Result<std::vector<pager::SourceRegionKeys>> region_keys(const Napi::Object& source) {
  struct HexKeys {
    std::string ram, data_map, presence, dirty_map;
  };
  const auto hex_keys = each(source, "keys", [](const Napi::Object& pair) {
    const auto optional = [&](const char* name) { return pair.Get(name).IsString() ? text(pair, name) : ""; };
    return HexKeys{text(pair, "ram"), text(pair, "dataMap"), optional("presence"), optional("dirtyMap")};
  });
  std::vector<pager::SourceRegionKeys> keys;
  for (const HexKeys& pair : hex_keys) {
    const auto ram = remote_key(pair.ram);
    if (!ram) return ram.error();
    const auto data_map = remote_key(pair.data_map);
    if (!data_map) return data_map.error();
    keys.push_back({ram.value(), data_map.value()});
    const std::pair<const std::string&, transport::RemoteKey&> optional[] = {
        {pair.presence, keys.back().presence}, {pair.dirty_map, keys.back().dirty_map}};
    for (const auto& [hex, key] : optional) {
      if (hex.empty()) continue;
      const auto parsed = remote_key(hex);
      if (!parsed) return parsed.error();
      key = parsed.value();
    }
  }
  return keys;
}

namespace {

constexpr const char* kVmStateNames[] = {"", "waiting", "attached", "complete", "gone", "refused"};

}  // namespace

Napi::Object vm_snapshot_object(Napi::Env env, const pager::VmSnapshot& snapshot) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("state", kVmStateNames[static_cast<size_t>(snapshot.state)]);
  object.Set("pid", snapshot.pid);
  Napi::Array descriptors = Napi::Array::New(env, snapshot.descriptors.size());
  for (uint32_t i = 0; i < snapshot.descriptors.size(); i++) {
    Napi::Object descriptor = Napi::Object::New(env);
    descriptor.Set("numberInVm", snapshot.descriptors[i].number_in_vm);
    descriptor.Set("kind", static_cast<double>(snapshot.descriptors[i].kind));
    descriptors.Set(i, descriptor);
  }
  object.Set("descriptors", descriptors);
  Napi::Array ranges = Napi::Array::New(env, snapshot.ranges.size());
  for (uint32_t i = 0; i < snapshot.ranges.size(); i++) {
    const pager::MappedRange& range = snapshot.ranges[i];
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("regionIndex", range.region_index);
    entry.Set("regionOffsetBytes", bigint(env, range.region_offset_bytes));
    entry.Set("lengthBytes", bigint(env, range.length_bytes));
    entry.Set("base", bigint(env, raw(range.base)));
    entry.Set("descriptorIndex", range.descriptor_index);
    ranges.Set(i, entry);
  }
  object.Set("ranges", ranges);
  object.Set("failure", failure_object(env, snapshot.failure));
  return object;
}

pager::VmSnapshot vm_snapshot(const Napi::Object& object) {
  pager::VmSnapshot snapshot;
  snapshot.pid = static_cast<pid_t>(number(object, "pid"));
  snapshot.descriptors = each(object, "descriptors", [](const Napi::Object& entry) {
    return pager::VmSnapshot::Descriptor{
        static_cast<int>(number(entry, "numberInVm")),
        wire::PreloadDescriptor{static_cast<uint8_t>(number(entry, "kind"))}};
  });
  snapshot.ranges = each(object, "ranges", [](const Napi::Object& entry) {
    return pager::MappedRange{static_cast<uint32_t>(number(entry, "regionIndex")),
                              u64(entry, "regionOffsetBytes"), u64(entry, "lengthBytes"),
                              HostAddr{u64(entry, "base")},
                              static_cast<uint32_t>(number(entry, "descriptorIndex"))};
  });
  return snapshot;
}

}  // namespace vmigrate::addon
