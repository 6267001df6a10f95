#pragma once

#include <memory>
#include <string>
#include <vector>

#include "memory/fill_state.hpp"
#include "memory/page_tags.hpp"
#include "memory/tag_file.hpp"

namespace vmigrate::pager {

/// Tags of the pages of a VM as they arrived, taken before the VM could see them: the VM writes to its memory
/// while more of it comes, so that what arrived cannot be found out later.
class ArrivalTags {
 public:
  /// One thread's access: each publisher has its own.
  class Writer {
   public:
    /// The run's bytes are complete, and nobody but this thread has its pages.
    Status note(uint32_t region_index, const FilledRegion& region, PageRun run);

   private:
    friend class ArrivalTags;
    Writer(ArrivalTags& tags, std::unique_ptr<memory::PageTagger> tagger)
        : tags_(tags), tagger_(std::move(tagger)) {}
    ArrivalTags& tags_;
    std::unique_ptr<memory::PageTagger> tagger_;
  };

  static Result<std::unique_ptr<ArrivalTags>> open(const std::vector<std::string>& paths,
                                                   const memory::TagKey& key, const FillState& fill,
                                                   bool resume);
  Result<std::unique_ptr<Writer>> writer();

 private:
  explicit ArrivalTags(const memory::TagKey& key) : key_(key) {}
  const memory::TagKey key_;
  std::vector<std::unique_ptr<memory::TagFile>> files_;
};

}  // namespace vmigrate::pager
