#pragma once

#include <napi.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "image/digests/digests.hpp"
#include "multicast/datagram/group.hpp"
#include "source/source.hpp"
#include "target/target.hpp"
#include "transport/registry/registry.hpp"
#include "vm/preload_listener.hpp"

namespace vmigrate::addon {

// Converts between JavaScript values and the core's types. src/native/binding.ts has checked the types of all
// arguments. The functions here check the values that a peer or a saved file may have supplied.

/// Throws `error` as a JavaScript Error with `nativeCode` (NATIVE_ERROR) and `errno`; binding.ts turns it
/// into a MigrationError.
void throw_error(Napi::Env env, const Error& error);
Napi::Object error_object(Napi::Env env, const Error& error);
/// {code, errno, what}, or null.
Napi::Value failure_object(Napi::Env env, const std::optional<Error>& failure);

std::string text(const Napi::Object& object, const char* name);
std::vector<std::string> texts(const Napi::Object& object, const char* name);
double number(const Napi::Object& object, const char* name);
uint64_t u64(const Napi::Object& object, const char* name);
bool flag(const Napi::Object& object, const char* name);
bool optional_flag(const Napi::Object& object, const char* name);

Napi::Value bigint(Napi::Env env, uint64_t value);
Napi::Value counters_array(Napi::Env env, std::span<const uint64_t> counters);

std::vector<pager::RegionFileConfig> region_files(const Napi::Object& options, const char* name = "regions");
std::vector<pager::SourceRegionConfig> source_regions(const Napi::Object& options);
/// `clone` without its process; nothing if it is missing.
std::optional<pager::SourceCloneConfig> source_clone(const Napi::Object& options);
std::vector<pager::TargetRegionConfig> target_regions(const Napi::Object& options,
                                                      const char* name = "regions");
Result<memory::TagKey> tag_key(const std::string& hex);
std::vector<pager::DigestRegionConfig> digest_regions(const Napi::Object& options, const char* name);

/// Two arguments: the number of the first page, and how many pages.
PageRun page_run(const Napi::CallbackInfo& info, size_t first_argument);

/// An order of clusters (memory/touch_order.hpp) as a Uint32Array; its values are not checked. Empty if it is
/// missing.
std::vector<uint32_t> cluster_order(const Napi::Value& value);
Napi::Value cluster_array(Napi::Env env, std::span<const uint32_t> order);

/// An address to listen on or to connect to: {provider, host, port, options?}. The options are numbers and
/// strings.
Result<const transport::Provider*> provider(const Napi::Object& place);
transport::Address address(const Napi::Object& place);
transport::Options provider_options(const Napi::Object& place);
Napi::Value devices_array(Napi::Env env, const std::vector<transport::Device>& devices);

/// `session` and `token` as hex of exactly their lengths.
Result<transport::Credentials> credentials(const Napi::Object& options);

/// What a multicast needs to be sent or joined. The variable VMIGRATE_MULTICAST_GRO=off keeps the kernel from
/// merging datagrams, for tests that lose single ones.
Result<multicast::Group> multicast_group(const Napi::Object& options);

/// Address, key and length, 16 hex digits each.
std::string to_hex(const transport::RemoteKey& key);
Result<transport::RemoteKey> remote_key(const std::string& hex);
/// `keys`, [{ram, dataMap, presence?}]. kProtocol if there are more than the maximum number of regions, or if
/// one is not a key.
Result<std::vector<pager::SourceRegionKeys>> region_keys(const Napi::Object& source);

Napi::Object vm_snapshot_object(Napi::Env env, const pager::VmSnapshot& snapshot);
pager::VmSnapshot vm_snapshot(const Napi::Object& object);

}  // namespace vmigrate::addon
